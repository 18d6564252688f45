//! Measurements: single operations against the machine's ceilings, and the workload.

mod ops;
mod trials;

pub use ops::{Ceilings, Measured, OpsReport, matmul_ceiling, ops};
pub use trials::{Workload, WorkloadReport, single, trials};

use std::time::Instant;

use crate::{
    device::{Buffer, Device},
    error::Result,
    ops::probe::{Probe, ProbeItem, probe},
};

/// Enough to empty the largest L2 cache.
const FLUSH_BYTES: usize = 256 << 20;
/// Runs of an operation: at least, at most, and seconds in between.
const RUNS: (usize, usize) = (5, 30);
const SECONDS: f64 = 0.4;

/// Seconds of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Of all runs.
    pub median: f64,
    /// (90th − 10th percentile) / median.
    pub spread: f64,
}

/// Times operations on a device, with what they read out of its caches.
pub struct Bench<'a> {
    device: &'a Device,
    flush: Option<Flush>,
}

/// What is read to empty the caches. Reading leaves nothing that an operation would have to write
/// back first.
struct Flush {
    /// (rows, dim)
    values: Buffer<f32>,
    /// (rows,), one for each.
    items: Buffer<ProbeItem>,
    /// (rows,), their norms.
    norms: Buffer<f32>,
}

impl Flush {
    const DIM: usize = 4096;

    fn new(device: &Device) -> Result<Self> {
        let item = |row| ProbeItem { row, first: 0, probes: 0, out: row };
        let items: Vec<_> = (0..(FLUSH_BYTES / 4 / Self::DIM) as u32).map(item).collect();
        Ok(Self {
            values: Buffer::zeroed(device, items.len() * Self::DIM)?,
            norms: Buffer::zeroed(device, items.len())?,
            items: Buffer::upload(device, &items)?,
        })
    }

    fn run(&mut self, device: &Device) -> Result<()> {
        let Self { values, items, norms } = self;
        let (count, dim) = (items.len(), Self::DIM);
        let (rows, vectors) = (&*values, &*values);
        probe(device, Probe { count, items, most: 0, rows, vectors, dim, out: norms })
    }
}

impl<'a> Bench<'a> {
    /// Takes what emptying the caches needs.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(device: &'a Device) -> Result<Self> {
        // The processor's caches are small beside what operations read.
        let flush = device.is_asynchronous().then(|| Flush::new(device)).transpose()?;
        Ok(Self { device, flush })
    }

    /// Times `run`, after a first call that does not count.
    ///
    /// # Errors
    /// What `run` fails with.
    pub fn time(&mut self, mut run: impl FnMut() -> Result<()>) -> Result<Timing> {
        run()?;
        self.device.synchronize()?;
        let (least, most) = RUNS;
        let start = Instant::now();
        let mut seconds = Vec::new();
        while seconds.len() < least
            || seconds.len() < most && start.elapsed().as_secs_f64() < SECONDS
        {
            if let Some(flush) = &mut self.flush {
                flush.run(self.device)?;
            }
            let begin = self.device.mark()?;
            run()?;
            let end = self.device.mark()?;
            end.wait()?;
            seconds.push(begin.seconds_to(&end)?);
        }
        seconds.sort_by(f64::total_cmp);
        let at = |part: f64| seconds[((seconds.len() - 1) as f64 * part).round() as usize];
        Ok(Timing { median: at(0.5), spread: (at(0.9) - at(0.1)) / at(0.5) })
    }
}
