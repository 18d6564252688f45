//! Captured rows: planned before a step runs, handed out after it. Rows that are only probed stay on the
//! device.

use std::sync::Arc;

use super::{
    core::Core,
    hooks::is_clean,
    prompts::{Key, RowKey},
    sites::{tap_index, tap_width},
    step::Plan,
    types::Reduce,
};
use crate::{
    error::Result,
    ops::{
        Float,
        probe::{Probe, ProbeItem, probe},
    },
};

/// Whose a captured row is.
pub(super) enum Taker {
    /// A capture of a prompt with injections, by number, and which of its positions.
    Trunk { trunk: u64, capture: usize, index: usize },
    /// A prompt's clean run.
    Clean { key: Key, at: RowKey },
}

/// A captured row on its way, or what becomes of it.
pub(super) struct Take {
    taker: Taker,
    is_probed: bool,
    /// First of its numbers, among what is captured or among what is probed.
    first: usize,
    len: usize,
}

/// What a step captures.
#[derive(Default)]
pub(super) struct Captures {
    /// (tap, row, destination).
    pub rows: Vec<(u32, u32, u32)>,
    pub takes: Vec<Take>,
    /// Rows of the step's part of the capture buffer that are handed out: its first ones.
    pub captured: usize,
    /// Rows of it that are only probed: its last ones.
    held: usize,
    items: Vec<ProbeItem>,
    /// Results of those.
    probed: usize,
}

/// A row that is to be captured.
struct Wanted<'a> {
    tap: usize,
    /// Row of the step.
    row: u32,
    /// The vectors that it is multiplied with, and where they are in the bank.
    probe: Option<(&'a Arc<[f32]>, u32)>,
}

impl<T: Float> Core<T> {
    /// Plans what a clean run keeps of a row; gives whether there is room for it.
    pub(super) fn plan_clean(&self, plan: &mut Plan, key: &Key, position: usize, row: u32) -> bool {
        let Some(clean) = self.prompts.get(key) else { return true };
        let Some(run) = &clean.running else { return true };
        let wanted = || {
            run.at(position).iter().map(|at| {
                let probe = at.probe.as_ref().map(|probe| run.place_of(probe));
                (at, Wanted { tap: at.tap as usize, row, probe })
            })
        };
        if !self.fits(&plan.captures, wanted().map(|(_, wanted)| wanted)) {
            return false;
        }
        for &layer in &run.layers {
            let kept = clean.residual_row(layer, position);
            let to = kept.map(|kept| self.limits.residual_row(kept) as u32);
            plan.captures.rows.extend(to.map(|to| (4 * layer as u32, row, to)));
        }
        for (at, wanted) in wanted() {
            self.plan_take(plan, Taker::Clean { key: key.clone(), at: at.clone() }, &wanted);
        }
        true
    }

    /// Plans the captures of a row of a prompt with injections; gives whether its logits are
    /// captured, or `None` where there is no room.
    pub(super) fn plan_captures(
        &self,
        plan: &mut Plan,
        id: u64,
        position: usize,
        row: u32,
    ) -> Option<bool> {
        let trunk = &self.trunks[&id];
        let layers = self.config.layers;
        let hits = || {
            trunk.job.capture.iter().enumerate().filter_map(move |(at, capture)| {
                let index = capture.positions.binary_search(&position).ok()?;
                Some((at, index, tap_index(capture, layers)))
            })
        };
        let own = || {
            hits().filter_map(|(at, index, tap)| {
                let tap = tap.filter(|&tap| !is_clean(tap, position, trunk.own, layers))?;
                let probe = match &trunk.job.capture[at].reduce {
                    Reduce::Probe(vectors) => {
                        let place =
                            trunk.probes.iter().find(|(other, _)| Arc::ptr_eq(other, vectors));
                        Some((vectors, place.map_or(0, |(_, first)| *first)))
                    }
                    Reduce::Rows | Reduce::Mean => None,
                };
                Some((at, index, Wanted { tap, row, probe }))
            })
        };
        if !self.fits(&plan.captures, own().map(|(.., wanted)| wanted)) {
            return None;
        }
        for (capture, index, wanted) in own() {
            self.plan_take(plan, Taker::Trunk { trunk: id, capture, index }, &wanted);
        }
        Some(hits().any(|(.., tap)| tap.is_none()))
    }

    /// Whether what a clean run is to keep of each position fits into one step.
    pub(super) fn fit_into_steps(&self, rows: &[RowKey]) -> bool {
        let empty = Captures::default();
        rows.chunk_by(|a, b| a.position == b.position).all(|here| {
            let wanted = here.iter().map(|at| {
                let probe = at.probe.as_ref().map(|probe| (&probe.0, 0));
                Wanted { tap: at.tap as usize, row: 0, probe }
            });
            self.fits(&empty, wanted)
        })
    }

    /// Whether a step has room for more rows.
    fn fits<'a>(&self, planned: &Captures, wanted: impl Iterator<Item = Wanted<'a>>) -> bool {
        let (mut rows, mut probed) = (planned.captured + planned.held, planned.probed);
        for wanted in wanted {
            rows += self.rows_of_tap(wanted.tap);
            probed += wanted.probe.map_or(0, |(vectors, _)| vectors.len() / self.config.dim + 1);
        }
        rows <= self.limits.capture_rows && probed <= self.limits.probed
    }

    /// Rows of the capture buffer that a row of a tap fills.
    fn rows_of_tap(&self, tap: usize) -> usize {
        tap_width(tap, &self.config).div_ceil(self.config.dim)
    }

    fn plan_take(&self, plan: &mut Plan, taker: Taker, wanted: &Wanted) {
        let (planned, dim) = (&mut plan.captures, self.config.dim);
        let rows = self.rows_of_tap(wanted.tap);
        let to = match wanted.probe {
            None => planned.captured,
            Some(_) => self.limits.capture_rows - planned.held - rows,
        };
        let to = self.limits.capture_row(plan.turn, to) as u32;
        planned.rows.push((wanted.tap as u32, wanted.row, to));
        let Some((vectors, first)) = wanted.probe else {
            let (first, len) = (planned.captured * dim, tap_width(wanted.tap, &self.config));
            planned.takes.push(Take { taker, is_probed: false, first, len });
            planned.captured += rows;
            return;
        };
        let (probes, out) = (vectors.len() / dim, planned.probed);
        planned.items.push(ProbeItem { row: to, first, probes: probes as u32, out: out as u32 });
        planned.takes.push(Take { taker, is_probed: true, first: out, len: probes + 1 });
        planned.held += rows;
        planned.probed += probes + 1;
    }

    /// Queues the products of rows that are probed, and their copy to the host.
    pub(super) fn queue_probes(&mut self, turn: usize, captures: &Captures) -> Result<()> {
        let Some(most) = captures.items.iter().map(|item| item.probes).max() else {
            return Ok(());
        };
        self.probe_items.write(0, &captures.items)?;
        let operands = Probe {
            count: captures.items.len(),
            items: &self.probe_items,
            most: most as usize,
            rows: &self.state.captured,
            vectors: &self.hooks.vectors,
            dim: self.config.dim,
            out: &mut self.probed,
        };
        probe(&self.device, operands)?;
        self.probed.fetch(0, captures.probed, &mut self.outputs[turn].probed, 0)
    }

    /// Hands out what a step captured.
    pub(super) fn collect_captures(&mut self, turn: usize, takes: &[Take]) {
        let outputs = &self.outputs[turn];
        for take in takes {
            let from = if take.is_probed { &outputs.probed } else { &outputs.captured };
            let row = &from.get()[take.first..][..take.len];
            match &take.taker {
                Taker::Clean { key, at } => self.prompts.keep_row(key, at, row),
                Taker::Trunk { trunk, capture, index } => {
                    if let Some(trunk) = self.trunks.get_mut(trunk) {
                        trunk.captures[*capture].take(*index, row);
                    }
                }
            }
        }
    }
}
