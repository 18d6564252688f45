//! `rope_append` and `attention` over the paged cache, and `copy_pages`.

use half::bf16;
use inkling::{
    device::{Buffer, Device},
    ops::{
        attention::{Cache, CacheShape, PAGE, attention},
        copy_pages::copy_pages,
        residual_norm::Rows,
        rope_append::{RopeTable, rope_append},
    },
};

use crate::{
    reference::ops::{attention as attend, rope},
    tools::{Numbers, Stored, U, close, first_difference, nans, on_every_isa, read, upload},
    tools::{sizes, widen},
};

/// Positions that a query sees: around a page (16), a tile (64) and a chunk (1,024).
const LENGTHS: [usize; 11] = [1, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 1100];
const POSITIONS: usize = 1100;
const BLOCKS: usize = POSITIONS.div_ceil(PAGE);
/// A few more than one sequence needs at one layer.
const PAGES: usize = 71;
const THETA: f32 = 10_000.0;
/// The page of a block; blocks 69 and 70, which no sequence has, give the free ones.
fn page(block: usize) -> u32 {
    ((block * 37 + 5) % PAGES) as u32
}

/// The sequence, the one that fills its pages with noise first, and their layer.
const SLOT: u32 = 2;
const NOISE: u32 = 0;
const LAYER: usize = 1;

/// Rows of one sequence.
fn rows(slot: u32, positions: impl IntoIterator<Item = usize>) -> Rows {
    let position: Vec<u32> = positions.into_iter().map(|position| position as u32).collect();
    Rows { slot: vec![slot; position.len()], receipt: vec![-1; position.len()], position }
}

/// One shape of heads with the rows of a sequence.
struct Case {
    kv_heads: usize,
    heads: usize,
    head_dim: usize,
    /// (positions, (heads + 2 · `kv_heads`) · `head_dim`), before rope.
    qkv: Vec<f32>,
}

impl Case {
    fn new(kv_heads: usize, group: usize, head_dim: usize) -> Self {
        let heads = kv_heads * group;
        let mut numbers = Numbers::new((heads * 1000 + head_dim) as u64);
        let (q, k) = (heads * head_dim, kv_heads * head_dim);
        let mut qkv = Vec::new();
        for _ in 0..POSITIONS {
            // Scores of a few units, so that the softmax is neither flat nor a single entry.
            qkv.extend(numbers.with_outliers(q + k, 20.0).iter().map(|v| v * 1.5));
            qkv.extend(numbers.with_outliers(k, 1000.0));
        }
        Self { kv_heads, heads, head_dim, qkv }
    }

    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    fn out_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// A cache whose pages, scattered, hold NaN everywhere.
    fn cache<T: Stored>(&self, device: &Device, rope: &RopeTable) -> Cache<T> {
        let shape = CacheShape {
            layers: 2,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            pages: PAGES,
            slots: 3,
            blocks: BLOCKS,
        };
        let mut cache = Cache::new(device, shape).unwrap();
        let pages: Vec<u32> = (0..BLOCKS).map(page).collect();
        for slot in [NOISE, SLOT] {
            cache.set_table(slot as usize, LAYER, &pages);
        }
        let at = rows(NOISE, 0..BLOCKS * PAGE);
        let mut noise = nans(device, BLOCKS * PAGE * 2 * self.kv_heads * self.head_dim);
        rope_append(device, BLOCKS * PAGE, 0, &mut noise, &at, rope, LAYER, &mut cache);
        cache
    }

    /// Rotated qkv of all positions, then the output of the last row of each length, while nothing
    /// but NaN is in the cache behind it, then the same rows in one batch over the full cache.
    fn run<T: Stored>(&self, device: &Device) -> Vec<Vec<f32>> {
        let rope = RopeTable::new(BLOCKS * PAGE, self.head_dim, THETA);
        let mut cache = self.cache::<T>(device, &rope);
        let (width, out_width) = (self.width(), self.out_width());
        let (mut rotated, mut alone) = (Vec::new(), Vec::new());
        let mut from = 0;
        for length in LENGTHS {
            let mut qkv = upload::<f32>(device, &self.qkv[from * width..length * width], 0);
            let at = rows(SLOT, from..length);
            let count = length - from;
            rope_append(device, count, self.heads, &mut qkv, &at, &rope, LAYER, &mut cache);
            rotated.extend(read(&qkv));
            let last = upload::<f32>(device, &rotated[(length - 1) * width..], 0);
            alone.extend(self.attend(device, &last, &[length], &cache));
            from = length;
        }
        let last = LENGTHS.map(|length| &rotated[(length - 1) * width..][..width]).concat();
        let batch = self.attend(device, &upload::<f32>(device, &last, width), &LENGTHS, &cache);
        assert_eq!(batch.len(), LENGTHS.len() * out_width);
        vec![rotated, alone, batch]
    }

    /// Attention of the rows that see these many positions.
    fn attend<T: Stored>(
        &self,
        device: &Device,
        qkv: &Buffer<f32>,
        lengths: &[usize],
        cache: &Cache<T>,
    ) -> Vec<f32> {
        let at = rows(SLOT, lengths.iter().map(|length| length - 1));
        let count = lengths.len();
        let mut out = nans::<T>(device, (count + 1) * self.out_width());
        attention(device, count, self.heads, qkv, &at, LAYER, cache, &mut out);
        let mut out = read(&out);
        let beyond = out.split_off(count * self.out_width());
        assert!(beyond.iter().all(|v| v.is_nan()), "rows that are not active were written");
        out
    }

    fn check<T: Stored>(&self) {
        let outputs = on_every_isa(0, |device| self.run::<T>(device));
        let [rotated, alone, batch] = &outputs[..] else { panic!("three outputs") };
        assert_eq!(first_difference(alone, batch), None, "a row depends on what is behind it");
        self.check_rope(rotated);
        let (width, out_width) = (self.width(), self.out_width());
        let kv = self.kv_heads * self.head_dim;
        // What the cache holds: k as rotated, and v, each rounded to its type.
        let part = |from: usize| -> Vec<Vec<f64>> {
            let row = |row: &[f32]| -> Vec<f64> {
                row[from..][..kv].iter().map(|&v| T::nearest(v)).collect()
            };
            rotated.chunks_exact(width).map(row).collect()
        };
        let (keys, values) = (part(out_width), part(out_width + kv));
        for (length, got) in LENGTHS.iter().zip(alone.chunks_exact(out_width)) {
            let query = widen(&rotated[(length - 1) * width..][..out_width]);
            let what = format!("{} of {} heads of {}", self.kv_heads, self.heads, self.head_dim);
            let what = format!("{what}, {length} positions");
            let (want, error) = self.want(&query, &keys[..*length], &values[..*length]);
            for ((&got, &want), error) in got.iter().zip(&want).zip(&error) {
                close(&what, got, want, 1.01 * (error + T::ROUNDOFF * (want.abs() + error)));
            }
        }
    }

    /// The output and how far f32 may be from it. A score is a chain of `head_dim` products, one
    /// scaling and one subtraction, so a weight eˢ is off by the scores' error twice (its own and
    /// the sum's); the output is a chain of as many products as there are positions, with one
    /// rescaling (an exponential of two ulp) a tile.
    fn want(&self, query: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>]) -> (Vec<f64>, Vec<f64>) {
        let (heads, kv_heads, head_dim) = (self.heads, self.kv_heads, self.head_dim);
        let want = attend(query, keys, values, heads, kv_heads);
        let value_sizes: Vec<Vec<f64>> = values.iter().map(|row| sizes(row)).collect();
        let size = attend(query, keys, &value_sizes, heads, kv_heads);
        let mut error = Vec::with_capacity(want.len());
        for (head, (q, size)) in
            query.chunks_exact(head_dim).zip(size.chunks_exact(head_dim)).enumerate()
        {
            let own = head / (heads / kv_heads) * head_dim;
            let score_size = |key: &Vec<f64>| -> f64 {
                key[own..][..head_dim].iter().zip(q).map(|(k, q)| (k * q).abs()).sum()
            };
            let largest = keys.iter().map(score_size).fold(0.0, f64::max);
            let score_error = (head_dim + 8) as f64 * U * largest / (head_dim as f64).sqrt();
            let tiles = keys.len().div_ceil(64);
            let chain = (keys.len() + 16 * tiles + 16) as f64 * U;
            error.extend(size.iter().map(|size| (2.0 * score_error + chain) * size));
        }
        (want, error)
    }

    /// Queries and keys are turned by the position's angles; values are left alone.
    fn check_rope(&self, rotated: &[f32]) {
        let (width, half) = (self.width(), self.head_dim / 2);
        let turned = (self.heads + self.kv_heads) * self.head_dim;
        // Two powers of theta may round to neighbours; the angle's error grows with the position.
        let power = |i: usize| f64::from(THETA).powf((2 * i) as f64 / self.head_dim as f64);
        let powers: Vec<f64> = (0..half).map(power).collect();
        let rows = rotated.chunks_exact(width).zip(self.qkv.chunks_exact(width));
        for (position, (got, row)) in rows.enumerate() {
            assert_eq!(first_difference(&got[turned..], &row[turned..]), None, "v at {position}");
            let row = widen(&row[..turned]);
            let mut want = row.clone();
            rope(&mut want, self.head_dim, position, THETA);
            for (at, (&got, &want)) in got.iter().zip(&want).enumerate() {
                let i = at % self.head_dim % half;
                let head = at / self.head_dim * self.head_dim;
                let size = row[head + i].abs() + row[head + i + half].abs();
                let tolerance = U * (4.0 + 4.0 * position as f64 / powers[i]) * size;
                close(&format_args!("position {position}, element {at}"), got, want, tolerance);
            }
        }
    }
}

#[test]
fn attention_is_softmax_of_scores_times_values() {
    for head_dim in [16, 24, 64, 80] {
        for (kv_heads, group) in [(2, 1), (2, 3), (1, 5)] {
            let case = Case::new(kv_heads, group, head_dim);
            case.check::<f32>();
            case.check::<bf16>();
        }
    }
}

/// Rows of two sequences whose tables share pages, in one batch, are the rows of each alone.
#[test]
fn sequences_of_a_batch_do_not_mix() {
    let case = Case::new(2, 3, 16);
    let width = case.width();
    on_every_isa(0, |device| {
        let rope = RopeTable::new(BLOCKS * PAGE, case.head_dim, THETA);
        let mut cache = case.cache::<f32>(device, &rope);
        // Slot 1 has other pages than slot 2 from the second block on.
        cache.set_table(1, LAYER, &[page(0), page(69), page(70)]);
        let mut run = |at: &Rows, from: usize| {
            let count = at.slot.len();
            let rows = &case.qkv[from * width..][..count * width];
            let mut qkv = upload::<f32>(device, rows, 0);
            rope_append(device, count, case.heads, &mut qkv, at, &rope, LAYER, &mut cache);
            let mut out = nans::<f32>(device, count * case.out_width());
            attention(device, count, case.heads, &qkv, at, LAYER, &cache, &mut out);
            read(&out)
        };
        run(&rows(SLOT, 0..16), 0);
        let (one, other) = (run(&rows(SLOT, 16..20), 16), run(&rows(1, 16..20), 30));
        // The same rows again, both sequences in one step.
        let both = [&case.qkv[16 * width..][..4 * width], &case.qkv[30 * width..][..4 * width]];
        let at = Rows {
            slot: vec![SLOT, SLOT, SLOT, SLOT, 1, 1, 1, 1],
            position: vec![16, 17, 18, 19, 16, 17, 18, 19],
            receipt: vec![-1; 8],
        };
        let mut qkv = upload::<f32>(device, &both.concat(), 0);
        rope_append(device, 8, case.heads, &mut qkv, &at, &rope, LAYER, &mut cache);
        let mut out = nans::<f32>(device, 8 * case.out_width());
        attention(device, 8, case.heads, &qkv, &at, LAYER, &cache, &mut out);
        let together = read(&out);
        assert_eq!(first_difference(&together, &[&one[..], &other[..]].concat()), None);
        assert_ne!(one, other);
        vec![together]
    });
}

/// A sequence forked inside a page reads the copy, whatever becomes of the original.
#[test]
fn copy_pages_copies_whole_pages() {
    check_copy::<f32>();
    check_copy::<bf16>();
}

fn check_copy<T: Stored>() {
    let case = Case::new(2, 3, 24);
    let width = case.width();
    on_every_isa(0, |device| {
        let rope = RopeTable::new(BLOCKS * PAGE, case.head_dim, THETA);
        let mut cache = case.cache::<T>(device, &rope);
        let mut qkv = upload::<f32>(device, &case.qkv[..40 * width], 0);
        let at = rows(SLOT, 0..40);
        rope_append(device, 40, case.heads, &mut qkv, &at, &rope, LAYER, &mut cache);
        let last = upload::<f32>(device, &read(&qkv)[39 * width..], 0);
        let original = case.attend(device, &last, &[40], &cache);

        copy_pages(device, &[(page(1), page(69)), (page(2), page(70))], &mut cache);
        assert_eq!(case.attend(device, &last, &[40], &cache), original, "the source is changed");
        // The original's second and third pages turn to noise; the fork has copies of them.
        let at = rows(NOISE, 16..48);
        let mut noise = nans(device, 32 * 2 * case.kv_heads * case.head_dim);
        rope_append(device, 32, 0, &mut noise, &at, &rope, LAYER, &mut cache);
        let spoilt = case.attend(device, &last, &[40], &cache);
        assert!(spoilt.iter().all(|v| v.is_nan()));
        cache.set_table(SLOT as usize, LAYER, &[page(0), page(69), page(70)]);
        let forked = case.attend(device, &last, &[40], &cache);
        assert_eq!(first_difference(&forked, &original), None);
        vec![forked]
    });
}
