//! What comes back from a step. On a GPU a step's results are copied to the host while the next
//! one runs, so two sets of host memory take turns.

use std::sync::Arc;

use super::{batch::PlannedRow, types::Job};
use crate::{
    device::{Device, Staging},
    error::Result,
    ops::{
        residual_norm::Receipt,
        sample::Draws,
        summarize::{Summaries, Summary, SummaryStaging},
    },
};

/// Host memory for the results of one step.
pub struct Outputs {
    /// (sites, rows): ‖h‖, where the step has rows of clean runs.
    pub norms: Staging<f32>,
    /// One for each operation of each row.
    pub receipts: Staging<Receipt>,
    /// (capture rows, dim).
    pub captured: Staging<f32>,
    /// Products of rows that are probed, and their norms.
    pub probed: Staging<f32>,
    chunks: Vec<Chunk>,
}

/// What rows of logits gave.
struct Chunk {
    tokens: Staging<u32>,
    summaries: SummaryStaging,
}

impl Outputs {
    /// Room for as much.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(
        device: &Device,
        norms: usize,
        receipts: usize,
        (captured, probed): (usize, usize),
    ) -> Result<Self> {
        Ok(Self {
            norms: Staging::new(device, norms)?,
            receipts: Staging::new(device, receipts)?,
            captured: Staging::new(device, captured)?,
            probed: Staging::new(device, probed)?,
            chunks: Vec::new(),
        })
    }

    /// Queues copies of what the step's chunk number `at` of logits gave.
    ///
    /// # Errors
    /// The device has failed.
    pub fn fetch(
        &mut self,
        device: &Device,
        at: usize,
        (draws, count): (&Draws, usize),
        summaries: &Summaries,
        summarized: bool,
    ) -> Result<()> {
        if at == self.chunks.len() {
            let tokens = Staging::new(device, draws.capacity())?;
            self.chunks.push(Chunk { tokens, summaries: summaries.staging(device)? });
        }
        let chunk = &mut self.chunks[at];
        draws.tokens.fetch(0, count, &mut chunk.tokens, 0)?;
        if summarized { summaries.fetch(&mut chunk.summaries) } else { Ok(()) }
    }

    /// The tokens that a chunk drew. The caller has waited.
    pub fn tokens(&self, at: usize) -> &[u32] {
        self.chunks[at].tokens.get()
    }

    /// The summaries of a chunk. The caller has waited.
    pub fn summaries(&self, at: usize) -> Vec<Summary> {
        self.chunks[at].summaries.get()
    }
}

/// A row whose logits are made, and what becomes of them.
#[derive(Clone, Debug)]
pub struct HeadRow {
    /// Which of the step's planned rows.
    pub row: PlannedRow,
    /// The jobs whose prompt it ends: their first tokens are drawn from it.
    pub jobs: Vec<(usize, Arc<Job>)>,
    /// First of its draws in its chunk, and how many.
    pub draws: (usize, usize),
    /// Which of the chunk's summaries is its.
    pub summary: Option<usize>,
}
