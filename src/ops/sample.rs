//! Draws the next token of each row: argmax of logits / T + Gumbel over the entries that top-k,
//! top-p and min-p leave, ties to the lowest id. With T = 0 the argmax of the logits.
//!
//! Randomness is a function of (seed, generated index, vocabulary id) only.

use super::{
    math::{exp, max},
    philox::{Purpose, ROW, gumbel, philox, philox_row, uniform},
    rows::NONE,
};
use crate::{
    device::{
        Buffer, Cuda, Device, Element,
        cpu::{Cpu, Isa, Kernel, Shared},
        cuda::{Launch, Params},
    },
    error::Result,
};

/// How one token is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Row of the logits; [`NONE`]: nothing is drawn.
    pub row: u32,
    /// The slot whose next row reads the token; [`NONE`]: none.
    pub slot: u32,
    /// The trial's seed.
    pub seed: u64,
    /// How many tokens were generated before.
    pub index: u32,
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
}

/// What is drawn from logits none of which is a number.
pub const NO_TOKEN: u32 = NONE;

/// A draw as the kernel reads it.
#[derive(Clone, Copy)]
#[repr(C)]
struct DrawWords {
    row: u32,
    slot: u32,
    seed: [u32; 2],
    index: u32,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
}
const _: () = assert!(size_of::<DrawWords>() == 36, "the kernel asserts the same");
// SAFETY: plain numbers without padding.
unsafe impl Element for DrawWords {}

/// The draws of a step, and what they give.
pub struct Draws {
    list: Vec<Draw>,
    words: Buffer<DrawWords>,
    /// One for each draw: its token, or [`NO_TOKEN`].
    pub tokens: Buffer<u32>,
    /// (slots,), the token that was last drawn for each.
    pub last: Buffer<u32>,
}

impl Draws {
    /// Room for `capacity` draws of `slots` sequences.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(device: &Device, capacity: usize, slots: usize) -> Result<Self> {
        Ok(Self {
            list: Vec::new(),
            words: Buffer::zeroed(device, capacity)?,
            tokens: Buffer::zeroed(device, capacity)?,
            last: Buffer::zeroed(device, slots)?,
        })
    }

    /// Draws that there is room for.
    pub fn capacity(&self) -> usize {
        self.words.len()
    }

    /// Writes the draws that the next call of [`sample`] makes.
    ///
    /// # Errors
    /// The device has failed.
    pub fn set(&mut self, draws: &[Draw]) -> Result<()> {
        let words = |draw: &Draw| DrawWords {
            row: draw.row,
            slot: draw.slot,
            seed: [draw.seed as u32, (draw.seed >> 32) as u32],
            index: draw.index,
            temperature: draw.temperature,
            top_k: draw.top_k,
            top_p: draw.top_p,
            min_p: draw.min_p,
        };
        self.list.clear();
        self.list.extend_from_slice(draws);
        self.words.write(0, &draws.iter().map(words).collect::<Vec<_>>())
    }
}

/// Draws a token for each of `draws`. logits: (rows, vocab).
///
/// # Errors
/// The device has failed.
pub fn sample(
    device: &Device,
    vocab: usize,
    logits: &Buffer<f32>,
    draws: &mut Draws,
) -> Result<()> {
    let rows = logits.len() / vocab;
    let fits = |draw: &Draw| draw.row == NONE || (draw.row as usize) < rows;
    assert!(draws.list.iter().all(fits), "a draw's row");
    match device {
        Device::Cpu(cpu) => on_cpu(cpu, vocab, logits, draws),
        Device::Cuda(cuda) => return launch(cuda, vocab, logits, draws),
    }
    Ok(())
}

fn on_cpu(cpu: &Cpu, vocab: usize, logits: &Buffer<f32>, draws: &mut Draws) {
    let tokens = Shared::new(draws.tokens.host_mut());
    cpu.parallel(draws.list.len(), |at| {
        let draw = &draws.list[at];
        if draw.row == NONE {
            return;
        }
        let logits = &logits.host()[draw.row as usize * vocab..][..vocab];
        // SAFETY: each task has its own token.
        let token = unsafe { tokens.range(at, 1) };
        token[0] = if draw.temperature == 0.0 {
            cpu.isa().run(Argmax(cpu.isa(), logits))
        } else if draw.top_k == 0 && draw.top_p >= 1.0 && draw.min_p <= 0.0 {
            cpu.isa().run(GumbelMax { isa: cpu.isa(), logits, draw })
        } else {
            among(&kept(logits, draw), logits, draw)
        };
    });
    for (draw, token) in draws.list.iter().zip(draws.tokens.host()) {
        if draw.row != NONE && draw.slot != NONE {
            draws.last.host_mut()[draw.slot as usize] = *token;
        }
    }
}

/// The most tokens that the kernel can sum the weights of.
pub const MAX_KERNEL_VOCAB: usize = (1 << 19) - 1;

/// Mirror of `SampleParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct SampleParams {
    logits: u64,
    draws: u64,
    tokens: u64,
    last: u64,
    vocab: i32,
    padding: i32,
}
const _: () = assert!(size_of::<SampleParams>() == 40, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/sample.cu.
unsafe impl Params for SampleParams {}

fn launch(cuda: &Cuda, vocab: usize, logits: &Buffer<f32>, draws: &mut Draws) -> Result<()> {
    let slots = draws.last.len();
    let fits = |draw: &Draw| draw.slot == NONE || (draw.slot as usize) < slots;
    assert!(draws.list.iter().all(fits), "a draw's slot");
    assert!(vocab <= MAX_KERNEL_VOCAB, "vocabulary");
    let params = SampleParams {
        logits: logits.address(),
        draws: draws.words.address(),
        tokens: draws.tokens.address_mut(),
        last: draws.last.address_mut(),
        vocab: vocab as i32,
        padding: 0,
    };
    // SAFETY: rows and slots were checked, and `list.len()` draws were written.
    unsafe { cuda.launch("sample", Launch::new(draws.list.len(), 512), &params) }
}

/// The lowest id of the largest logit.
struct Argmax<'a>(Isa, &'a [f32]);

impl Kernel for Argmax<'_> {
    type Output = u32;
    #[inline(always)]
    fn run(self) -> u32 {
        let best = max(self.0, self.1);
        match best {
            f32::NEG_INFINITY => NO_TOKEN,
            _ => self.1.iter().position(|&v| v == best).unwrap_or(0) as u32,
        }
    }
}

/// Counters that give a block its words, four each.
const COUNTERS: usize = ROW;
/// Entries whose randomness is made at once.
const BLOCK: usize = 4 * COUNTERS;
/// Word `at % 4` of counter `at / 4` is for entry `at` of a block.
type Words = [[u32; COUNTERS]; 4];

struct GumbelMax<'a> {
    isa: Isa,
    logits: &'a [f32],
    draw: &'a Draw,
}

impl GumbelMax<'_> {
    #[inline(always)]
    fn words(&self, block: usize) -> Words {
        let first = (block * COUNTERS) as u32;
        philox_row(self.isa, self.draw.seed, [first, self.draw.index, Purpose::Token as u32, 0])
    }

    /// Scores a block and keeps the better of its best and `best`.
    #[inline(always)]
    fn visit(&self, block: usize, words: &Words, best: (f32, u32)) -> (f32, u32) {
        let first = block * BLOCK;
        let logits = &self.logits[first..self.logits.len().min(first + BLOCK)];
        let mut scores = [0.0; BLOCK];
        for (at, &logit) in logits.iter().enumerate() {
            scores[at] = logit / self.draw.temperature + gumbel(words[at % 4][at / 4]);
        }
        let mut best = best;
        for (at, &logit) in logits.iter().enumerate() {
            if logit > f32::NEG_INFINITY {
                best = better(best, (scores[at], (first + at) as u32));
            }
        }
        best
    }
}

/// The larger score; of equal ones the lower id.
#[inline(always)]
fn better(a: (f32, u32), b: (f32, u32)) -> (f32, u32) {
    if b.0 > a.0 || (b.0 == a.0 && b.1 < a.1) { b } else { a }
}

impl Kernel for GumbelMax<'_> {
    type Output = u32;
    #[inline(always)]
    fn run(self) -> u32 {
        let top = max(self.isa, self.logits);
        let is_top = |logits| max(self.isa, logits) == top;
        let first = self.logits.chunks(BLOCK).position(is_top).unwrap_or(0);
        let mut best = self.visit(first, &self.words(first), (f32::NEG_INFINITY, NO_TOKEN));
        for (block, logits) in self.logits.chunks(BLOCK).enumerate() {
            // An entry beats `best` only if g > best − l, that is u < 1 − exp(−exp(l − best)),
            // which is below exp(l − best). Most blocks hold no such u, so no logarithm is taken.
            // The slack covers the rounding of both sides, half a unit in the last place each.
            let top = max(self.isa, logits) / self.draw.temperature;
            let slack = (top.abs() + best.0.abs()).mul_add(2.0 * f32::EPSILON, 1e-3);
            let bound = exp(top - best.0 + slack);
            if bound < uniform(0) {
                continue;
            }
            let words = self.words(block);
            let mut smallest = [u32::MAX; COUNTERS];
            for words in &words {
                for (smallest, &word) in smallest.iter_mut().zip(words) {
                    *smallest = word.min(*smallest);
                }
            }
            let smallest = smallest.into_iter().fold(u32::MAX, u32::min);
            if uniform(smallest) <= bound {
                best = self.visit(block, &words, best);
            }
        }
        best.1
    }
}

/// Ids that top-k, top-p and min-p leave, in transformers' order: each on what the one before
/// left, of logits / T.
pub(crate) fn kept(logits: &[f32], draw: &Draw) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let by_logit =
        |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let k = draw.top_k as usize;
    if k > 0 && k < ids.len() {
        let (_, &mut kth, _) = ids.select_nth_unstable_by(k - 1, by_logit);
        let threshold = logits[kth as usize];
        ids.retain(|&id| logits[id as usize] >= threshold);
    }
    if ids.is_empty() {
        return ids; // no logit is a number
    }
    ids.sort_unstable_by(by_logit);
    let weight = |id: u32| {
        f64::from((logits[id as usize] - logits[ids[0] as usize]) / draw.temperature).exp()
    };
    if draw.top_p < 1.0 {
        let total: f64 = ids.iter().map(|&id| weight(id)).sum();
        let mut before = 0.0;
        let keep = ids
            .iter()
            .take_while(|&&id| {
                let keep = before < f64::from(draw.top_p) * total;
                before += weight(id);
                keep
            })
            .count();
        let keep = keep.max(1);
        ids.truncate(keep);
    }
    if draw.min_p > 0.0 {
        let logits_of = |id: u32| f64::from(logits[id as usize] / draw.temperature);
        let floor = logits_of(ids[0]) + f64::from(draw.min_p).ln();
        ids.retain(|&id| logits_of(id) >= floor);
    }
    ids
}

fn among(ids: &[u32], logits: &[f32], draw: &Draw) -> u32 {
    let score = |id: u32| {
        let words = philox(draw.seed, [id / 4, draw.index, Purpose::Token as u32, 0]);
        logits[id as usize] / draw.temperature + gumbel(words[id as usize % 4])
    };
    let none = (f32::NEG_INFINITY, NO_TOKEN);
    let ids = ids.iter().filter(|&&id| logits[id as usize] > f32::NEG_INFINITY);
    ids.fold(none, |best, &id| better(best, (score(id), id))).1
}
