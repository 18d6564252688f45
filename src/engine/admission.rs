//! Admission: which waiting jobs start, in which slots, with which pages. Jobs that have a prompt
//! and its injections in common start together, from one pass over it.

use std::sync::Arc;

use super::{
    bank::InBank,
    core::Core,
    hooks::{self, Own, Planned, Tally, are_continued_alike, clean_rows, have_same_prompt},
    kv::PageTable,
    prompts::{CleanRun, Key, RowKey, VectorId},
    sequence::{
        Active, Captured, Child, Pending, Role, Sequence, Trunk, continuations, rows_of, samples,
    },
    sites::row_shape,
    types::{Capture, Event, Job},
};
use crate::{
    device::{Device, cuda::Mark},
    error::{Error, Result},
    ops::{
        Float,
        attention::{Cache, PAGE, SharedPrefix, TILE},
        copy_pages::copy_pages,
        hooks::{GATES, site_count},
        rows::NONE,
    },
};

/// Waiting jobs that are looked at for one that can start.
const LOOK_AHEAD: usize = 256;
/// Clean runs at a time.
const CLEAN_RUNS: usize = 8;

/// Copies pages of the cache, and notes begin and end: the next step counts the time.
fn copy<T: Float>(
    device: &Device,
    pairs: &[[u32; 2]],
    cache: &mut Cache<T>,
    copies: &mut Vec<[Mark; 2]>,
) -> Result<()> {
    if pairs.is_empty() {
        return Ok(());
    }
    let begin = device.mark()?;
    copy_pages(device, pairs, cache)?;
    copies.push([begin, device.mark()?]);
    Ok(())
}

/// A job's operations, and its probes with their places in the bank.
type Resolved = (Vec<Planned>, Vec<InBank>);

/// Pages that a prompt and its continuations need.
struct Room {
    /// Of the prompt, or with its one continuation.
    blocks: usize,
    /// New pages among them, all layers.
    fresh: usize,
    /// New pages of each continuation.
    child: usize,
    is_sole: bool,
}

/// Positions of the prompt that a job shares with its clean run, at a layer.
fn shared_positions(own: Own, prompt: usize, layer: usize) -> usize {
    if layer < own.cut { prompt } else { own.start }
}

/// Whole blocks that a table shares where it shares so many positions, and whether one more is
/// shared in part.
fn shared_blocks(positions: usize) -> (usize, bool) {
    (positions / PAGE, !positions.is_multiple_of(PAGE))
}

fn tiles(positions: usize) -> u32 {
    (positions / TILE) as u32
}

impl<T: Float> Core<T> {
    pub(super) fn free_slot(&self) -> Option<usize> {
        self.slots.iter().position(Option::is_none)
    }

    /// Rows of prompts in slots that no step has taken yet.
    fn waiting_rows(&self) -> usize {
        let prompts = self.slots.iter().flatten().filter(|s| !matches!(s.role, Role::Sample(_)));
        prompts.map(|s| s.tokens.len() - s.next).sum()
    }

    /// Starts what can start: continuations first, then waiting jobs in order, no more than the
    /// next step has rows for: the others start while that one runs.
    pub(super) fn admit(&mut self) -> Result<()> {
        while let Some(child) = self.children.pop_front() {
            if let Some(child) = self.start_child(child)? {
                self.children.push_front(child);
                return Ok(());
            }
        }
        let (mut at, mut waiting) = (0, self.waiting_rows());
        while at < self.queue.len().min(LOOK_AHEAD) && waiting < self.limits.rows {
            let pending = &self.queue[at];
            if pending.needs_clean {
                let (key, own, job) = (pending.key.clone(), pending.own, Arc::clone(&pending.job));
                let rows = clean_rows(&job, own, self.config.layers).map(|row| row.at);
                match self.prompts.get(&key) {
                    Some(clean) if clean.serves(own, rows) => {}
                    Some(clean) if clean.is_used() => {
                        at += 1;
                        continue;
                    }
                    _ => {
                        if !self.start_clean(at, &key, own)? {
                            return Ok(());
                        }
                        waiting = self.waiting_rows();
                        at += 1;
                        continue;
                    }
                }
            }
            if !self.start_jobs(at)? {
                return Ok(());
            }
            waiting = self.waiting_rows();
        }
        Ok(())
    }

    /// The captured rows that jobs take from a prompt's clean run, and that it does not have yet.
    fn missing_rows<'a>(&self, key: &Key, jobs: impl Iterator<Item = &'a Pending>) -> Vec<RowKey> {
        let (depth, held) = (self.config.layers, self.prompts.get(key));
        let rows = jobs.flat_map(|pending| clean_rows(&pending.job, pending.own, depth));
        let missing = rows.filter(|row| held.is_none_or(|held| held.captured(&row.at).is_none()));
        let mut rows: Vec<RowKey> = missing.map(|row| row.at).collect();
        rows.sort_unstable();
        rows.dedup();
        rows
    }

    /// Starts the clean run that the waiting job at `at` needs, keeping what others need of it too.
    fn start_clean(&mut self, at: usize, key: &Key, own: Own) -> Result<bool> {
        let runs = self.slots.iter().flatten().filter(|s| matches!(s.role, Role::Clean(..)));
        let Some(slot) = self.free_slot().filter(|_| runs.count() < CLEAN_RUNS) else {
            return Ok(false);
        };
        let waiting = || self.queue.iter().take(LOOK_AHEAD).filter(|pending| pending.key == *key);
        let starting = || waiting().filter(|pending| pending.own.cut > 0);
        let mut layers: Vec<usize> = starting().map(|pending| pending.own.cut).collect();
        let from = starting().map(|pending| pending.own.start).min().unwrap_or(own.start);
        layers.sort_unstable();
        layers.dedup();
        // The first job's layer first: it must have room.
        layers.sort_by_key(|&layer| layer != own.cut);
        let mut captures = self.missing_rows(key, waiting());
        let mut probes = None;
        if self.fit_into_steps(&captures) {
            probes = self.take_probes(&captures)?;
        }
        if probes.is_none() {
            // All together want too much: the first one fits by itself.
            captures = self.missing_rows(key, std::iter::once(&self.queue[at]));
            probes = self.take_probes(&captures)?;
        }
        let Some(probes) = probes else { return Ok(false) };
        let depth = self.config.layers;
        let wanted = self.queue.iter().take(LOOK_AHEAD).filter(|pending| pending.key == *key);
        let wanted = wanted.flat_map(|pending| clean_rows(&pending.job, pending.own, depth));
        self.prompts.trim(key, wanted.map(|row| row.at));

        let is_new = self.prompts.get(key).is_none();
        let Some(known) = (if is_new { self.insert_clean(key)? } else { Some(key.len() - 1) })
        else {
            self.release_probes(&probes);
            return Ok(false);
        };
        let layers = self.prompts.reserve(key, &layers, from);
        if own.cut > 0 && !layers.contains(&own.cut) {
            if is_new {
                self.prompts.remove(&mut self.pool, key);
            }
            self.release_probes(&probes);
            return Ok(false);
        }
        let kept = if layers.is_empty() { known } else { from };
        let first = captures.first().map_or(known, |at| at.position as usize);
        let next = known.min(kept).min(first);
        let Some(entry) = self.prompts.touch(key) else { return Ok(false) };
        entry.running = Some(CleanRun { layers, captures, probes });
        let pages = entry.pages.clone();
        let sequence =
            Sequence::new(Role::Clean(key.clone()), key.to_vec(), next, pages, Vec::new());
        self.occupy(slot, sequence)?;
        Ok(true)
    }

    /// Makes a new prompt's entry, with what another prompt's clean run has of its beginning; gives
    /// how many positions those are, or `None` where there is no room.
    fn insert_clean(&mut self, key: &Key) -> Result<Option<usize>> {
        let (depth, blocks) = (self.config.layers, key.len().div_ceil(PAGE));
        let from = self.prompts.longest_prefix(key).filter(|_| self.limits.share);
        let from = from.map(|(_, from, known)| (from.clone(), known));
        let shared = from.as_ref().map_or(0, |(_, known)| shared_blocks(*known).0);
        let wanted = depth * (blocks - shared) + self.reserved;
        // What is begun with must stay.
        let keep = from.as_ref().map_or(key, |(from, _)| from);
        if !self.prompts.make_room(&mut self.pool, wanted, keep) {
            return Ok(None);
        }
        let Some((from, known)) = from else {
            let pages = PageTable::take(&mut self.pool, depth, blocks);
            self.prompts.insert(key.clone(), pages, site_count(depth));
            return Ok(Some(0));
        };
        let Some(begun) = self.prompts.touch(&from) else { return Ok(None) };
        let (pages, copies) =
            PageTable::fork(&begun.pages, &mut self.pool, blocks, |_| shared_blocks(known));
        copy(&self.device, &copies, &mut self.cache, &mut self.copies)?;
        self.prompts.insert(key.clone(), pages, site_count(depth));
        self.prompts.copy_norms(&from, key, known);
        Ok(Some(known))
    }

    /// The job at `at` and those behind it with the same prompt and injections, as many as may be
    /// continued at a time: their places in the queue.
    fn group(&self, at: usize) -> Vec<usize> {
        let first = &self.queue[at];
        let ids = |job: &Job| job.watch.len() + job.score.len() + samples(job);
        let (mut count, mut wanted) = (continuations(&first.job), ids(&first.job));
        let mut group = vec![at];
        if !self.limits.share {
            return group;
        }
        for (place, other) in self.queue.iter().enumerate().take(LOOK_AHEAD).skip(at + 1) {
            let (more, more_ids) = (continuations(&other.job), ids(&other.job));
            // All first tokens are drawn from one row, and its logits read at once.
            if count + more <= self.limits.slots
                && wanted + more_ids <= self.limits.ids
                && first.key == other.key
                && have_same_prompt(&first.job, &other.job)
            {
                count += more;
                wanted += more_ids;
                group.push(place);
            }
        }
        group
    }

    fn room(&self, own: Own, group: &[usize]) -> Room {
        let jobs = || group.iter().map(|&place| &self.queue[place].job);
        let (prompt, layers) =
            (jobs().map(|job| job.tokens.len()).max().unwrap_or(0), self.config.layers);
        let rows = jobs().map(|job| rows_of(job)).max().unwrap_or(0);
        let children: usize = jobs().map(|job| continuations(job)).sum();
        let is_sole = children == 1;
        let blocks = if is_sole { rows } else { prompt }.div_ceil(PAGE);
        let shared = |layer| shared_blocks(shared_positions(own, prompt, layer)).0;
        let child = if children < 2 { 0 } else { (rows.div_ceil(PAGE) - prompt / PAGE) * layers };
        let fresh = (0..layers).map(|layer| blocks - shared(layer)).sum();
        Room { blocks, fresh, child, is_sole }
    }

    /// Starts the waiting job at `at` with those that share its prompt and injections: `true` it is
    /// out of the queue, `false` there is no room now.
    fn start_jobs(&mut self, at: usize) -> Result<bool> {
        let Some(slot) = self.free_slot() else { return Ok(false) };
        let group = self.group(at);
        let pending = &self.queue[at];
        let (job, key, own) = (Arc::clone(&pending.job), pending.key.clone(), pending.own);
        let room = self.room(own, &group);
        let wanted = room.fresh + room.child + self.reserved;
        if !self.prompts.make_room(&mut self.pool, wanted, &key) {
            return Ok(false);
        }
        let (planned, probes) = match self.plan(&key, &job)? {
            Ok(Some(planned)) => planned,
            Ok(None) => return Ok(false),
            Err(error) => {
                if let Some(pending) = self.queue.remove(at) {
                    drop(pending.events.send((pending.tag, Event::Failed(error))));
                }
                return Ok(true);
            }
        };
        let taken = group.iter().rev().filter_map(|&place| self.queue.remove(place));
        let mut askers: Vec<Pending> = taken.collect();
        askers.reverse();
        self.reserved += room.child;
        let trunk = self.start_trunk(slot, (&job, key, own), &room, (planned, probes))?;
        let id = self.next_trunk;
        self.next_trunk += 1;
        let alone = askers.len() * job.tokens.len() * self.config.layers;
        self.stats.unshared_prompt_layer_rows += alone as u64;
        self.trunks.insert(id, trunk);
        askers.into_iter().for_each(|asker| self.add_job(id, asker));
        Ok(true)
    }

    /// Puts a prompt with its injections into a slot.
    fn start_trunk(
        &mut self,
        slot: usize,
        (job, key, own): (&Arc<Job>, Key, Own),
        room: &Room,
        (planned, probes): Resolved,
    ) -> Result<Trunk> {
        let (prompt, layers) = (job.tokens.len(), self.config.layers);
        let forks = own.start > 0 || own.cut > 0;
        let blocks = room.blocks;
        let shared = |layer| shared_blocks(shared_positions(own, prompt, layer));
        let (pages, copies) = match self.prompts.touch(&key).filter(|_| forks) {
            Some(clean) => PageTable::fork(&clean.pages, &mut self.pool, blocks, shared),
            None => (PageTable::take(&mut self.pool, layers, blocks), Vec::new()),
        };
        copy(&self.device, &copies, &mut self.cache, &mut self.copies)?;
        let clean = self.prompts.touch(&key).filter(|_| forks);
        let prompt_shared = clean.map_or(SharedPrefix::default(), |clean| SharedPrefix {
            group: clean.id << 1,
            tiles_below: tiles(prompt),
            tiles_above: tiles(own.start),
            cut: own.cut as u32,
        });
        let width = |site| row_shape(site, &self.config).into_iter().product::<usize>();
        let captured = |capture: &Capture| Captured::new(capture, width(capture.site));
        let mut captures: Vec<Captured> = job.capture.iter().map(captured).collect();
        if let Some(clean) = self.prompts.touch(&key).filter(|_| forks) {
            clean.users += 1;
            for row in clean_rows(job, own, layers) {
                let values =
                    clean.captured(&row.at).expect("a job starts when its clean run has all");
                captures[row.capture].take(row.index, values);
            }
        }
        let tally = vec![Tally::default(); planned.len()];
        let role = Role::Trunk(self.next_trunk);
        let sequence = Sequence::new(role, job.tokens.clone(), own.start, pages, tally.clone());
        self.occupy(slot, Sequence { shared: prompt_shared, ..sequence })?;
        self.write_ops(slot, &planned, &[NONE; GATES])?;
        let shared = if room.is_sole {
            prompt_shared
        } else {
            let (group, tiles) = (self.next_trunk << 1 | 1, tiles(prompt));
            SharedPrefix { group, tiles_below: tiles, tiles_above: tiles, cut: 0 }
        };
        Ok(Trunk {
            jobs: Vec::new(),
            job: Arc::clone(job),
            key,
            own,
            holds_clean: forks,
            planned,
            shared,
            tally,
            latched: [NONE; GATES],
            captures,
            probes,
            pages: None,
            is_sole: room.is_sole,
            child_pages: room.child,
        })
    }

    /// A job of a prompt that has just started: a new one, or one more who asks for the same.
    fn add_job(&mut self, trunk: u64, mut asker: Pending) {
        let clean = self.prompts.get(&asker.key).filter(|_| asker.needs_clean);
        let norms = clean.map(|clean| clean.norms(asker.key.len()));
        let reference = |i| norms.and_then(|norms| norms.reference(i));
        asker.references = asker.job.inject.iter().map(reference).collect();
        let Some(of) = self.trunks.get_mut(&trunk) else { return };
        let is_alike = |job: &&usize| are_continued_alike(self.jobs[*job].job(), &asker.job);
        if let Some(job) = of.jobs.iter().find(is_alike).filter(|_| self.limits.share) {
            self.jobs.get_mut(job).expect("it runs").askers.push(asker);
            return;
        }
        of.jobs.push(self.next_job);
        self.jobs.insert(self.next_job, Active::new(trunk, asker));
        self.next_job += 1;
    }

    /// Resolves a job's operations and puts their vectors into the bank; `None` where that is full.
    /// The inner error is the job's, the outer one the device's.
    fn plan(
        &mut self,
        key: &Key,
        job: &Job,
    ) -> Result<std::result::Result<Option<Resolved>, Error>> {
        let clean = self.prompts.get(key).filter(|clean| clean.running.is_none());
        let clean = clean.map(|clean| clean.norms(key.len()));
        // Refusals come before the bank is touched.
        let mut planned = match hooks::plan(job, self.config.layers, clean) {
            Ok(planned) => planned,
            Err(error) => return Ok(Err(error)),
        };
        if !self.limits.hooks {
            planned.clear();
        }
        for at in 0..planned.len() {
            let Planned { vector: Some(vector), rows, .. } = &planned[at] else { continue };
            let (vector, rows) = (Arc::clone(vector), *rows);
            let Some(first) = self.take_vectors(&vector, rows)? else {
                self.release_vectors(&planned[..at]);
                return Ok(Ok(None));
            };
            planned[at].op.vector = first;
        }
        let mut probes = Vec::new();
        for vectors in hooks::probes(job) {
            let Some(first) = self.take_vectors(vectors, vectors.len() / self.config.dim)? else {
                self.release_vectors(&planned);
                self.release_probes(&probes);
                return Ok(Ok(None));
            };
            probes.push((Arc::clone(vectors), first));
        }
        Ok(Ok(Some((planned, probes))))
    }

    /// The first of the bank's rows that hold vectors, or `None` where it is full.
    fn take_vectors(&mut self, vectors: &Arc<[f32]>, rows: usize) -> Result<Option<u32>> {
        let Some((first, is_new)) = self.bank.take(vectors, rows) else { return Ok(None) };
        if is_new {
            // A head's vector is shorter than a row of the bank.
            for (row, values) in vectors.chunks(vectors.len() / rows).enumerate() {
                self.hooks.vectors.write((first as usize + row) * self.config.dim, values)?;
            }
        }
        Ok(Some(first))
    }

    /// Puts the vectors into the bank that a clean run's rows are multiplied with.
    fn take_probes(&mut self, captures: &[RowKey]) -> Result<Option<Vec<InBank>>> {
        let mut taken: Vec<InBank> = Vec::new();
        for VectorId(vectors) in captures.iter().filter_map(|at| at.probe.as_ref()) {
            let is_known = taken.iter().any(|(other, _)| Arc::ptr_eq(other, vectors));
            if is_known || vectors.is_empty() {
                continue;
            }
            let rows = vectors.len() / self.config.dim;
            let Some(first) = self.take_vectors(vectors, rows)? else {
                self.release_probes(&taken);
                return Ok(None);
            };
            taken.push((Arc::clone(vectors), first));
        }
        Ok(Some(taken))
    }

    /// Gives operations' vectors back.
    pub(super) fn release_vectors(&mut self, planned: &[Planned]) {
        for planned in planned {
            if let Some(vector) = &planned.vector {
                self.bank.release(vector, planned.rows);
            }
        }
    }

    /// Likewise those of probes.
    pub(super) fn release_probes(&mut self, probes: &[InBank]) {
        for (vectors, _) in probes {
            self.bank.release(vectors, vectors.len() / self.config.dim);
        }
    }

    fn write_ops(
        &mut self,
        slot: usize,
        planned: &[Planned],
        latched: &[u32; GATES],
    ) -> Result<()> {
        let ops: Vec<_> = planned.iter().map(|p| (p.tap, p.op)).collect();
        self.hooks.set(slot, &ops, latched)
    }

    fn occupy(&mut self, slot: usize, sequence: Sequence) -> Result<()> {
        self.cache.set_tables(slot, &sequence.pages.layers)?;
        self.next_sequence += 1;
        self.slots[slot] = Some(Sequence { id: self.next_sequence, ..sequence });
        Ok(())
    }

    /// Starts a continuation; gives it back where there is no room.
    fn start_child(&mut self, child: Child) -> Result<Option<Child>> {
        let Some(slot) = self.free_slot() else { return Ok(Some(child)) };
        let Some(active) = self.jobs.get_mut(&child.job) else { return Ok(None) };
        let (id, job) = (active.trunk, Arc::clone(active.job()));
        let Some(trunk) = self.trunks.get_mut(&id) else { return Ok(None) };
        let prompt = job.tokens.len();
        let pages = if trunk.is_sole {
            trunk.pages.take().expect("a prompt's pages stay until its continuations start")
        } else {
            let blocks = rows_of(&job).div_ceil(PAGE);
            let wanted = (blocks - prompt / PAGE) * self.config.layers;
            if !self.prompts.make_room(&mut self.pool, wanted, &trunk.key) {
                return Ok(Some(child));
            }
            let from = trunk.pages.as_ref().expect("likewise");
            let shared = |_| shared_blocks(prompt);
            let (pages, copies) = PageTable::fork(from, &mut self.pool, blocks, shared);
            copy(&self.device, &copies, &mut self.cache, &mut self.copies)?;
            pages
        };
        active.waiting -= 1;
        let (planned, shared, latched) = (trunk.planned.clone(), trunk.shared, trunk.latched);
        self.settle_trunk(id);
        let tally = hooks::tallies(&planned, &latched);
        let mut tokens = job.tokens.clone();
        let is_score = child.index >= samples(&job);
        // The last given token needs no row: nothing follows it.
        let fed = if is_score { child.tokens.len() - 1 } else { child.tokens.len() };
        tokens.extend(&child.tokens[..fed]);
        let role = if is_score { Role::Score(child) } else { Role::Sample(child) };
        let sequence = Sequence::new(role, tokens, prompt, pages, tally);
        self.occupy(slot, Sequence { shared, ..sequence })?;
        self.write_ops(slot, &planned, &latched)?;
        Ok(None)
    }
}
