//! What a row of logits says: logsumexp, entropy, chosen tokens' logits and the most likely ones.

use super::{
    math::{LANES, exp, max},
    rows::NONE,
};
use crate::{
    device::{
        Buffer, Cuda, Device, Element, Staging,
        cpu::{Cpu, Isa, Kernel, Shared},
        cuda::{Launch, Params},
    },
    error::Result,
};

/// An id whose logit is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Id {
    /// This token.
    Token(u32),
    /// The token of this draw of the step.
    Drawn(u32),
}

/// What is wanted of a row.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Row of the logits.
    pub row: usize,
    /// Ids whose logits are wanted.
    pub ids: Vec<Id>,
    /// How many of the most likely tokens are wanted.
    pub top: usize,
}

/// The answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Natural log of the sum of the exponentials.
    pub logsumexp: f32,
    /// Of softmax(logits), in nats.
    pub entropy: f32,
    /// Logits of the wanted ids.
    pub logits: Vec<f32>,
    /// The most likely tokens, best first, ties to the lower id, with their log-probabilities.
    pub top: Vec<(u32, f32)>,
}

/// A [`Wanted`] as the kernel reads it.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct WantedWords {
    row: u32,
    first_id: u32,
    ids: u32,
    first_top: u32,
    top: u32,
}
const _: () = assert!(size_of::<WantedWords>() == 20, "the kernel asserts the same");
// SAFETY: plain numbers without padding.
unsafe impl Element for WantedWords {}

/// High bit of an id: the token of a draw.
const DRAWN: u32 = 1 << 31;

/// Summaries of a step on the device: what is wanted, and the answers.
pub struct Summaries {
    wanted: Vec<WantedWords>,
    words: Buffer<WantedWords>,
    ids: Buffer<u32>,
    /// (logsumexp, entropy) of each.
    sums: Buffer<[f32; 2]>,
    id_logits: Buffer<f32>,
    top_ids: Buffer<u32>,
    top_logits: Buffer<f32>,
}

/// Summaries on the host.
pub struct SummaryStaging {
    wanted: Vec<WantedWords>,
    sums: Staging<[f32; 2]>,
    id_logits: Staging<f32>,
    top_ids: Staging<u32>,
    top_logits: Staging<f32>,
}

impl Summaries {
    /// Room for summaries of `rows` rows with `ids` ids and `top` most likely tokens in all.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(device: &Device, rows: usize, ids: usize, top: usize) -> Result<Self> {
        Ok(Self {
            wanted: Vec::new(),
            words: Buffer::zeroed(device, rows)?,
            ids: Buffer::zeroed(device, ids)?,
            sums: Buffer::zeroed(device, rows)?,
            id_logits: Buffer::zeroed(device, ids)?,
            top_ids: Buffer::zeroed(device, top)?,
            top_logits: Buffer::zeroed(device, top)?,
        })
    }

    /// Memory on the host for as many.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn staging(&self, device: &Device) -> Result<SummaryStaging> {
        Ok(SummaryStaging {
            wanted: Vec::new(),
            sums: Staging::new(device, self.sums.len())?,
            id_logits: Staging::new(device, self.id_logits.len())?,
            top_ids: Staging::new(device, self.top_ids.len())?,
            top_logits: Staging::new(device, self.top_logits.len())?,
        })
    }

    /// Whether there is room for this much.
    pub fn fits(&self, rows: usize, ids: usize, top: usize) -> bool {
        rows <= self.words.len() && ids <= self.ids.len() && top <= self.top_ids.len()
    }

    fn set(&mut self, wanted: &[Wanted], vocab: usize) -> Result<()> {
        let ids = wanted.iter().map(|want| want.ids.len()).sum();
        let top = wanted.iter().map(|want| want.top.min(vocab)).sum();
        assert!(self.fits(wanted.len(), ids, top), "summaries beyond their memory");
        let (mut ids, mut first_top) = (Vec::new(), 0);
        self.wanted.clear();
        for want in wanted {
            let words = WantedWords {
                row: want.row as u32,
                first_id: ids.len() as u32,
                ids: want.ids.len() as u32,
                first_top,
                top: want.top.min(vocab) as u32,
            };
            first_top += words.top;
            ids.extend(want.ids.iter().map(|id| match *id {
                Id::Token(token) => token,
                Id::Drawn(draw) => draw | DRAWN,
            }));
            self.wanted.push(words);
        }
        self.words.write(0, &self.wanted)?;
        self.ids.write(0, &ids)
    }

    /// Queues copies of the answers to the host.
    ///
    /// # Errors
    /// The device has failed.
    pub fn fetch(&self, to: &mut SummaryStaging) -> Result<()> {
        let last = self.wanted.last().copied().unwrap_or_default();
        let (ids, top) = (last.first_id + last.ids, last.first_top + last.top);
        to.wanted.clone_from(&self.wanted);
        self.sums.fetch(0, self.wanted.len(), &mut to.sums, 0)?;
        self.id_logits.fetch(0, ids as usize, &mut to.id_logits, 0)?;
        self.top_ids.fetch(0, top as usize, &mut to.top_ids, 0)?;
        self.top_logits.fetch(0, top as usize, &mut to.top_logits, 0)
    }
}

impl SummaryStaging {
    /// The answers, in the order they were wanted. The caller has waited for the copies.
    pub fn get(&self) -> Vec<Summary> {
        let summary = |(want, sums): (&WantedWords, &[f32; 2])| {
            let [logsumexp, entropy] = *sums;
            let (first, top) = (want.first_top as usize, want.top as usize);
            let top_ids = &self.top_ids.get()[first..first + top];
            let top_logits = &self.top_logits.get()[first..first + top];
            let top = top_ids.iter().zip(top_logits);
            Summary {
                logsumexp,
                entropy,
                logits: self.id_logits.get()[want.first_id as usize..][..want.ids as usize]
                    .to_vec(),
                top: top.map(|(&id, &logit)| (id, logit - logsumexp)).collect(),
            }
        };
        self.wanted.iter().zip(self.sums.get()).map(summary).collect()
    }
}

/// Summaries of rows of logits, (rows, vocab); `tokens` are the step's draws.
///
/// # Errors
/// The device has failed.
pub fn summarize(
    device: &Device,
    vocab: usize,
    logits: &Buffer<f32>,
    tokens: &Buffer<u32>,
    wanted: &[Wanted],
    out: &mut Summaries,
) -> Result<()> {
    let id_fits = |id: &Id| match *id {
        Id::Token(token) => (token as usize) < vocab,
        Id::Drawn(draw) => (draw as usize) < tokens.len(),
    };
    let fits =
        |want: &Wanted| (want.row + 1) * vocab <= logits.len() && want.ids.iter().all(id_fits);
    assert!(wanted.iter().all(fits), "rows or ids of summaries");
    out.set(wanted, vocab)?;
    match device {
        Device::Cpu(cpu) => on_cpu(cpu, vocab, logits, tokens, out),
        Device::Cuda(cuda) => return launch(cuda, vocab, logits, tokens, out),
    }
    Ok(())
}

fn on_cpu(
    cpu: &Cpu,
    vocab: usize,
    logits: &Buffer<f32>,
    tokens: &Buffer<u32>,
    out: &mut Summaries,
) {
    let sums = Shared::new(out.sums.host_mut());
    let id_logits = Shared::new(out.id_logits.host_mut());
    let top_ids = Shared::new(out.top_ids.host_mut());
    let top_logits = Shared::new(out.top_logits.host_mut());
    let ids = out.ids.host();
    cpu.parallel(out.wanted.len(), |at| {
        let want = out.wanted[at];
        let row = &logits.host()[want.row as usize * vocab..][..vocab];
        let (first_id, ids_len) = (want.first_id as usize, want.ids as usize);
        let (first_top, top_len) = (want.first_top as usize, want.top as usize);
        // SAFETY: each task has its own summary, whose parts do not overlap another's.
        let (sums, id_logits, top_ids, top_logits) = unsafe {
            (
                sums.range(at, 1),
                id_logits.range(first_id, ids_len),
                top_ids.range(first_top, top_len),
                top_logits.range(first_top, top_len),
            )
        };
        sums[0] = cpu.isa().run(Softmax(cpu.isa(), row)).into();
        for (&id, out) in ids[first_id..].iter().zip(id_logits) {
            let id = if id & DRAWN == 0 { id } else { tokens.host()[(id & !DRAWN) as usize] };
            // Where nothing could be drawn, any id will do.
            *out = row[if id == NONE { vocab - 1 } else { id as usize }];
        }
        for ((id, logit), best) in top_ids.iter_mut().zip(top_logits).zip(top(row, top_len)) {
            (*id, *logit) = (best, row[best as usize]);
        }
    });
}

/// Mirror of `SummarizeParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct SummarizeParams {
    logits: u64,
    wanted: u64,
    ids: u64,
    tokens: u64,
    sums: u64,
    id_logits: u64,
    top_ids: u64,
    top_logits: u64,
    vocab: i32,
    padding: i32,
}
const _: () = assert!(size_of::<SummarizeParams>() == 72, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/summarize.cu.
unsafe impl Params for SummarizeParams {}

fn launch(
    cuda: &Cuda,
    vocab: usize,
    logits: &Buffer<f32>,
    tokens: &Buffer<u32>,
    out: &mut Summaries,
) -> Result<()> {
    let params = SummarizeParams {
        logits: logits.address(),
        wanted: out.words.address(),
        ids: out.ids.address(),
        tokens: tokens.address(),
        sums: out.sums.address_mut(),
        id_logits: out.id_logits.address_mut(),
        top_ids: out.top_ids.address_mut(),
        top_logits: out.top_logits.address_mut(),
        vocab: vocab as i32,
        padding: 0,
    };
    // SAFETY: rows and ids were checked, and the answers have room (`Summaries::set`).
    unsafe { cuda.launch("summarize", Launch::new(out.wanted.len(), 512), &params) }
}

/// Gives (logsumexp, entropy).
struct Softmax<'a>(Isa, &'a [f32]);

impl Kernel for Softmax<'_> {
    type Output = (f32, f32);
    #[inline(always)]
    fn run(self) -> (f32, f32) {
        let top = max(self.0, self.1);
        let (mut sums, mut products) = ([0.0f64; LANES], [0.0f64; LANES]);
        let (chunks, rest) = self.1.as_chunks::<LANES>();
        for chunk in chunks {
            for lane in 0..LANES {
                let shifted = chunk[lane] - top;
                let weight = f64::from(exp(shifted));
                sums[lane] += weight;
                // 0 · −∞ is 0 here, as its limit is.
                products[lane] += if weight > 0.0 { weight * f64::from(shifted) } else { 0.0 };
            }
        }
        for (lane, &v) in rest.iter().enumerate() {
            let weight = f64::from(exp(v - top));
            sums[lane] += weight;
            products[lane] += if weight > 0.0 { weight * f64::from(v - top) } else { 0.0 };
        }
        let (sum, product): (f64, f64) = (sums.iter().sum(), products.iter().sum());
        ((f64::from(top) + sum.ln()) as f32, (sum.ln() - product / sum) as f32)
    }
}

fn top(row: &[f32], count: usize) -> Vec<u32> {
    let count = count.min(row.len());
    if count == 0 {
        return Vec::new();
    }
    let by_logit = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
    ids.select_nth_unstable_by(count - 1, by_logit);
    ids.truncate(count);
    ids.sort_unstable_by(by_logit);
    ids
}
