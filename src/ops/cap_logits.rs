//! What some models do to logits: `l = cap · tanh(scale · l / cap)`, or `l = scale · l` without a cap
//! (Gemma 2's soft cap, Granite's divisor). In f32, in place.

use super::math::exp;
use crate::{
    device::{
        Buffer, Cuda, Device,
        cpu::{Cpu, Kernel, Shared},
        cuda::{Launch, Params},
    },
    error::Result,
};

/// Logits of a task.
const PART: usize = 4096;

/// The first `count` logits; a `cap` above 0, or none.
///
/// # Errors
/// The device has failed.
pub fn cap_logits(
    device: &Device,
    count: usize,
    scale: f32,
    cap: Option<f32>,
    logits: &mut Buffer<f32>,
) -> Result<()> {
    assert!(logits.len() >= count, "logits");
    match device {
        Device::Cpu(cpu) => on_cpu(cpu, count, scale, cap, logits),
        Device::Cuda(cuda) => return launch(cuda, count, scale, cap, logits),
    }
    Ok(())
}

fn on_cpu(cpu: &Cpu, count: usize, scale: f32, cap: Option<f32>, logits: &mut Buffer<f32>) {
    let logits = Shared::new(logits.host_mut());
    cpu.parallel_chunks(count, PART, |range| {
        // SAFETY: each task has its own range.
        let values = unsafe { logits.range(range.start, range.len()) };
        cpu.isa().run(Capped { values, scale, cap });
    });
}

struct Capped<'a> {
    values: &'a mut [f32],
    scale: f32,
    cap: Option<f32>,
}

impl Kernel for Capped<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let Some(cap) = self.cap else {
            for value in self.values {
                *value *= self.scale;
            }
            return;
        };
        for value in self.values {
            let y = *value * self.scale / cap;
            // tanh |y| = (1 − e^(−2|y|)) / (1 + e^(−2|y|)).
            let small = exp(-2.0 * y.abs());
            *value = (cap * ((1.0 - small) / (1.0 + small))).copysign(y);
        }
    }
}

/// Mirror of `CapLogitsParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct CapLogitsParams {
    logits: u64,
    count: u64,
    scale: f32,
    cap: f32,
}
const _: () = assert!(size_of::<CapLogitsParams>() == 24, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/cap_logits.cu.
unsafe impl Params for CapLogitsParams {}

fn launch(
    cuda: &Cuda,
    count: usize,
    scale: f32,
    cap: Option<f32>,
    logits: &mut Buffer<f32>,
) -> Result<()> {
    let params = CapLogitsParams {
        logits: logits.address_mut(),
        count: count as u64,
        scale,
        cap: cap.unwrap_or(0.0),
    };
    let blocks = count.div_ceil(1024).min(8 * cuda.multiprocessors()).max(1);
    // SAFETY: the length was checked.
    unsafe { cuda.launch("cap_logits", Launch::new(blocks, 256), &params) }
}
