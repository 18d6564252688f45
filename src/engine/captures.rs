//! Captured rows: planned before a step runs, handed out after it.

use super::{
    core::Core,
    hooks::is_clean,
    prompts::Key,
    sites::{tap_index, tap_width},
    step::Plan,
};
use crate::ops::Float;

/// Whose a captured row is.
pub(super) enum Taker {
    /// A capture of a prompt with injections, by number, and which of its positions.
    Trunk { trunk: u64, capture: usize, index: usize },
    /// A prompt's clean run; the row's tap and position.
    Clean { key: Key, at: (u32, u32) },
}

/// A captured row on its way.
pub(super) struct Take {
    taker: Taker,
    /// First row of the step's part of the capture buffer.
    from: usize,
    /// Numbers from its start on.
    width: usize,
}

impl<T: Float> Core<T> {
    /// Plans what a clean run keeps of a row; gives whether there is room for it.
    pub(super) fn plan_clean(&self, plan: &mut Plan, key: &Key, position: usize, row: u32) -> bool {
        let Some(clean) = self.prompts.get(key) else { return true };
        let Some(run) = &clean.running else { return true };
        let wanted: usize = run.taps(position).map(|tap| self.rows_of_tap(tap as usize)).sum();
        if plan.captured + wanted > self.limits.capture_rows {
            return false;
        }
        for &layer in &run.layers {
            let kept = clean.residual_row(layer, position);
            let to = kept.map(|kept| self.limits.residual_row(kept) as u32);
            plan.captures.extend(to.map(|to| (4 * layer as u32, row, to)));
        }
        for tap in run.taps(position) {
            let taker = Taker::Clean { key: key.clone(), at: (tap, position as u32) };
            self.plan_take(plan, taker, tap, row);
        }
        true
    }

    /// Plans the captures of a row of a prompt with injections; gives whether its logits are
    /// captured, or `None` where the capture buffer is full.
    pub(super) fn plan_captures(
        &self,
        plan: &mut Plan,
        id: u64,
        position: usize,
        row: u32,
    ) -> Option<bool> {
        let trunk = &self.trunks[&id];
        let hits = || {
            trunk.job.capture.iter().enumerate().filter_map(move |(at, capture)| {
                let index = capture.positions.binary_search(&position).ok()?;
                Some((at, index, tap_index(capture, self.config.layers)))
            })
        };
        let own = |tap: &usize| !is_clean(*tap, position, trunk.own, self.config.layers);
        let taps = hits().filter_map(|(.., tap)| tap.filter(own));
        let wanted: usize = taps.map(|tap| self.rows_of_tap(tap)).sum();
        if plan.captured + wanted > self.limits.capture_rows {
            return None;
        }
        for (capture, index, tap) in hits() {
            if let Some(tap) = tap.filter(own) {
                let taker = Taker::Trunk { trunk: id, capture, index };
                self.plan_take(plan, taker, tap as u32, row);
            }
        }
        Some(hits().any(|(.., tap)| tap.is_none()))
    }

    /// Rows of the capture buffer that a row of a tap fills.
    fn rows_of_tap(&self, tap: usize) -> usize {
        tap_width(tap, &self.config).div_ceil(self.config.dim)
    }

    fn plan_take(&self, plan: &mut Plan, taker: Taker, tap: u32, row: u32) {
        let (from, width) = (plan.captured, tap_width(tap as usize, &self.config));
        plan.captures.push((tap, row, self.limits.capture_row(plan.turn, from) as u32));
        plan.captured += self.rows_of_tap(tap as usize);
        plan.takes.push(Take { taker, from, width });
    }

    /// Hands out the rows that a step captured into its part of the buffer.
    pub(super) fn collect_captures(&mut self, turn: usize, takes: &[Take]) {
        let dim = self.config.dim;
        let captured = self.outputs[turn].captured.get();
        for take in takes {
            let row = &captured[take.from * dim..][..take.width];
            match &take.taker {
                Taker::Clean { key, at } => self.prompts.keep_row(key, *at, row),
                Taker::Trunk { trunk, capture, index } => {
                    if let Some(trunk) = self.trunks.get_mut(trunk) {
                        let out = &mut trunk.captures[*capture][index * take.width..];
                        out[..take.width].copy_from_slice(row);
                    }
                }
            }
        }
    }
}
