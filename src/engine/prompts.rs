//! The clean runs of prompts: their pages, norms and cached residual rows, found by content and
//! evicted least recently used.

use std::{
    cmp::Ordering,
    collections::{HashMap, HashSet},
    hash::{Hash, Hasher},
    sync::Arc,
};

use super::{
    bank::InBank,
    hooks::{CleanNorms, Own},
    kv::{PagePool, PageTable},
};
use crate::ops::attention::PAGE;

/// A prompt's tokens: its name.
pub type Key = Arc<[u32]>;

/// What is kept of a prompt's clean run.
#[derive(Debug)]
pub struct CleanPrompt {
    /// Names its pages.
    pub id: u64,
    /// Its keys and values, all layers, all positions.
    pub pages: PageTable,
    /// ‖h‖, (sites, positions).
    pub norms: Vec<f32>,
    /// Residual rows at `resid_pre.L`, by L.
    residuals: HashMap<usize, Residual>,
    /// Captured rows, or what was made of them.
    captured: HashMap<RowKey, Box<[f32]>>,
    /// What the sequence that computes it now keeps.
    pub running: Option<CleanRun>,
    /// Jobs whose prompt rows are still to come.
    pub users: usize,
    last_used: u64,
}

/// What a clean run under way keeps beside keys, values and norms.
#[derive(Debug, Default)]
pub struct CleanRun {
    /// Layers whose residual rows are kept.
    pub layers: Vec<usize>,
    /// Captured rows, by position.
    pub captures: Vec<RowKey>,
    /// Where in the bank the vectors are that they are multiplied with.
    pub probes: Vec<InBank>,
}

impl CleanRun {
    /// What is captured at a position.
    pub fn at(&self, position: usize) -> &[RowKey] {
        let position = position as u32;
        let first = self.captures.partition_point(|at| at.position < position);
        let end = self.captures.partition_point(|at| at.position <= position);
        &self.captures[first..end]
    }

    /// The vectors of a probe, and where in the bank they are, if there are any.
    pub fn place_of<'a>(&self, probe: &'a VectorId) -> (&'a Arc<[f32]>, u32) {
        let place = self.probes.iter().find(|(other, _)| Arc::ptr_eq(other, &probe.0));
        (&probe.0, place.map_or(0, |(_, first)| *first))
    }
}

/// A captured row of a clean run.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowKey {
    /// Where in the prompt.
    pub position: u32,
    /// Where in the model.
    pub tap: u32,
    /// What it is multiplied with, instead of being kept itself.
    pub probe: Option<VectorId>,
}

/// Vectors, the same where they are the same memory, or none at all.
#[derive(Clone, Debug)]
pub struct VectorId(pub Arc<[f32]>);

impl VectorId {
    fn address(&self) -> usize {
        if self.0.is_empty() { 0 } else { self.0.as_ptr() as usize }
    }
}

impl PartialEq for VectorId {
    fn eq(&self, other: &Self) -> bool {
        self.address() == other.address()
    }
}

impl Eq for VectorId {}

impl Ord for VectorId {
    fn cmp(&self, other: &Self) -> Ordering {
        self.address().cmp(&other.address())
    }
}

impl PartialOrd for VectorId {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Hash for VectorId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.address().hash(state);
    }
}

/// Residual rows of positions `from..`, in pages of [`PAGE`] rows.
#[derive(Debug)]
struct Residual {
    from: usize,
    pages: Vec<u32>,
}

impl CleanPrompt {
    /// The row of the residual cache that holds a position at a layer.
    pub fn residual_row(&self, layer: usize, position: usize) -> Option<usize> {
        let residual = self.residuals.get(&layer)?;
        let at = position.checked_sub(residual.from)?;
        Some(residual.pages[at / PAGE] as usize * PAGE + at % PAGE)
    }

    /// Whether a job can start from it, its own part and its clean captured rows being these.
    pub fn serves(&self, own: Own, mut rows: impl Iterator<Item = RowKey>) -> bool {
        self.running.is_none()
            && (own.cut == 0 || self.residuals.get(&own.cut).is_some_and(|r| r.from <= own.start))
            && rows.all(|at| self.captured.contains_key(&at))
    }

    /// A captured row, or what was made of it.
    pub fn captured(&self, at: &RowKey) -> Option<&[f32]> {
        self.captured.get(at).map(Box::as_ref)
    }

    /// Whether it is being computed, or jobs still read it.
    pub fn is_used(&self) -> bool {
        self.users > 0 || self.running.is_some()
    }

    fn captured_bytes(&self) -> usize {
        self.captured.values().map(|row| kept_bytes(row)).sum()
    }

    /// The norms, for `prompt` positions.
    pub fn norms(&self, prompt: usize) -> CleanNorms<'_> {
        CleanNorms { norms: &self.norms, prompt }
    }
}

/// Of a captured row and of its place in the table.
fn kept_bytes(row: &[f32]) -> usize {
    size_of_val(row) + 2 * size_of::<(RowKey, Box<[f32]>)>()
}

/// All clean runs at hand.
#[derive(Debug)]
pub struct Prompts {
    entries: HashMap<Key, CleanPrompt>,
    /// Pages of residual rows.
    rows: PagePool,
    /// Of captured rows.
    captured_bytes: usize,
    /// The most of them that are kept while nobody uses them.
    most_captured: usize,
    clock: u64,
}

impl Prompts {
    /// Room for `row_pages` pages of residual rows, and for so many bytes of captured rows that nobody
    /// uses.
    pub fn new(row_pages: usize, most_captured: usize) -> Self {
        Self {
            entries: HashMap::new(),
            rows: PagePool::new(row_pages),
            captured_bytes: 0,
            most_captured,
            clock: 0,
        }
    }

    /// The clean run of a prompt.
    pub fn get(&self, key: &Key) -> Option<&CleanPrompt> {
        self.entries.get(key)
    }

    /// Likewise, marked as used now.
    pub fn touch(&mut self, key: &Key) -> Option<&mut CleanPrompt> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.last_used = self.clock;
        Some(entry)
    }

    /// A new entry, about to be computed.
    pub fn insert(&mut self, key: Key, pages: PageTable, sites: usize) {
        self.clock += 1;
        let entry = CleanPrompt {
            id: self.clock,
            pages,
            norms: vec![0.0; sites * key.len()],
            residuals: HashMap::new(),
            captured: HashMap::new(),
            running: None,
            users: 0,
            last_used: self.clock,
        };
        self.entries.insert(key, entry);
    }

    /// The clean run that has most of the beginning of a prompt, and how many positions, less than
    /// all.
    pub fn longest_prefix(&self, key: &Key) -> Option<(&CleanPrompt, &Key, usize)> {
        let common = |other: &Key| {
            let equal = key[..key.len() - 1].iter().zip(other.iter());
            equal.take_while(|(a, b)| a == b).count()
        };
        let ready = self.entries.iter().filter(|(_, entry)| entry.running.is_none());
        let with_lengths = ready.map(|(other, entry)| (entry, other, common(other)));
        with_lengths
            .filter(|&(.., length)| length > 0)
            .max_by_key(|&(entry, _, length)| (length, entry.last_used))
    }

    /// Takes over the norms of the first positions from another prompt that begins likewise.
    pub fn copy_norms(&mut self, from: &Key, to: &Key, positions: usize) {
        let Some(norms) = self.entries.get(from).map(|entry| &entry.norms) else { return };
        let known: Vec<Vec<f32>> =
            norms.chunks_exact(from.len()).map(|site| site[..positions].to_vec()).collect();
        let Some(entry) = self.entries.get_mut(to) else { return };
        for (site, known) in entry.norms.chunks_exact_mut(to.len()).zip(known) {
            site[..positions].copy_from_slice(&known);
        }
    }

    /// Keeps a captured row of a prompt's clean run; others make room for it.
    pub fn keep_row(&mut self, key: &Key, at: &RowKey, row: &[f32]) {
        let Some(entry) = self.touch(key) else { return };
        if entry.captured.insert(at.clone(), row.into()).is_none() {
            self.captured_bytes += kept_bytes(row);
        }
        while self.captured_bytes > self.most_captured && self.evict_captured(key) {}
    }

    /// Drops captured rows of a prompt that nobody wants any more, where there are too many. Nobody may be using
    /// this prompt's rows.
    pub fn trim(&mut self, key: &Key, wanted: impl Iterator<Item = RowKey>) {
        if self.captured_bytes <= self.most_captured {
            return;
        }
        let wanted: HashSet<RowKey> = wanted.collect();
        let Some(entry) = self.entries.get_mut(key) else { return };
        let before = entry.captured_bytes();
        entry.captured.retain(|at, _| wanted.contains(at));
        self.captured_bytes -= before - entry.captured_bytes();
    }

    /// Drops the captured rows of the least recently used prompt that nobody uses.
    fn evict_captured(&mut self, keep: &Key) -> bool {
        let idle = self
            .entries
            .iter_mut()
            .filter(|(key, entry)| *key != keep && !entry.is_used() && !entry.captured.is_empty());
        let Some((_, oldest)) = idle.min_by_key(|(_, entry)| entry.last_used) else { return false };
        self.captured_bytes -= oldest.captured_bytes();
        oldest.captured.clear();
        true
    }

    /// Takes room for residual rows of positions `from..` at as many of `layers`, in order, as
    /// there is room for; gives those layers. The first one is needed now: this prompt's rows at
    /// all others make room for it. Nobody may be using this prompt's rows.
    pub fn reserve(&mut self, key: &Key, layers: &[usize], from: usize) -> Vec<usize> {
        let blocks = (key.len() - from).div_ceil(PAGE);
        let mut reserved = Vec::new();
        for (at, &layer) in layers.iter().enumerate() {
            let old = self.entries.get_mut(key).and_then(|entry| entry.residuals.remove(&layer));
            if let Some(old) = old {
                old.pages.iter().for_each(|&page| self.rows.release(page));
            }
            let kept = if at == 0 { &layers[..1] } else { layers };
            while self.rows.available() < blocks {
                if !self.evict_residuals(key, kept) {
                    return reserved;
                }
            }
            let pages = (0..blocks).map(|_| self.rows.take()).collect();
            let Some(entry) = self.entries.get_mut(key) else { return reserved };
            entry.residuals.insert(layer, Residual { from, pages });
            reserved.push(layer);
        }
        reserved
    }

    /// Frees residual rows that nobody waits for: the least recently used prompt's, or, last of
    /// all, those of this prompt's other layers.
    fn evict_residuals(&mut self, keep: &Key, layers: &[usize]) -> bool {
        let idle = self
            .entries
            .iter_mut()
            .filter(|(key, entry)| *key != keep && !entry.is_used() && !entry.residuals.is_empty());
        if let Some((_, entry)) = idle.min_by_key(|(_, entry)| entry.last_used) {
            for (_, residual) in entry.residuals.drain() {
                residual.pages.iter().for_each(|&page| self.rows.release(page));
            }
            return true;
        }
        let Some(entry) = self.entries.get_mut(keep).filter(|entry| entry.users == 0) else {
            return false;
        };
        let mut freed = false;
        entry.residuals.retain(|layer, residual| {
            let stays = layers.contains(layer);
            if !stays {
                residual.pages.iter().for_each(|&page| self.rows.release(page));
                freed = true;
            }
            stays
        });
        freed
    }

    /// Forgets a prompt whose run could not be started.
    pub fn remove(&mut self, pool: &mut PagePool, key: &Key) {
        let Some(entry) = self.entries.remove(key) else { return };
        self.captured_bytes -= entry.captured_bytes();
        entry.pages.release(pool);
        for residual in entry.residuals.into_values() {
            residual.pages.iter().for_each(|&page| self.rows.release(page));
        }
    }

    /// Evicts clean runs, least recently used first, until `wanted` cache pages are free. `keep`
    /// stays. Gives whether they are; where they could not be, nothing is evicted.
    pub fn make_room(&mut self, pool: &mut PagePool, wanted: usize, keep: &Key) -> bool {
        if pool.available() >= wanted {
            return true;
        }
        let idle = self.entries.iter().filter(|(key, entry)| *key != keep && !entry.is_used());
        let pages = idle.flat_map(|(_, entry)| entry.pages.layers.iter().flatten());
        let reclaimable = pages.filter(|&&page| pool.is_held_once(page)).count();
        if pool.available() + reclaimable < wanted {
            return false;
        }
        while pool.available() < wanted {
            let idle = self.entries.iter().filter(|(key, entry)| *key != keep && !entry.is_used());
            let oldest = idle.min_by_key(|(_, entry)| entry.last_used).map(|(key, _)| key.clone());
            let Some(oldest) = oldest else { return false };
            self.remove(pool, &oldest);
        }
        true
    }
}
