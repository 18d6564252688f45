//! `rope_append` and `attention` over the paged cache, and `copy_pages`.

use half::bf16;
use inkling::{
    device::{Buffer, Device},
    model::Rope,
    ops::{
        attention::{
            Attention, AttentionPlan, Cache, CacheShape, Items, PAGE, SharedPrefix, attention,
        },
        copy_pages::copy_pages,
        rope_append::{QueryNorms, RopeAppend, RopeTable, rope_append},
        rows::{RowList, Rows},
    },
};

use crate::{
    reference::ops::{attention as attend, rms_norm, rope},
    tools::{Numbers, Stored, U, close, first_difference, nan_activations, nans},
    tools::{on_every_device, on_every_family, read, read_rows, sizes, upload, widen},
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
fn rows(slot: u32, positions: impl IntoIterator<Item = usize>) -> RowList {
    let position: Vec<u32> = positions.into_iter().map(|position| position as u32).collect();
    RowList { slot: vec![slot; position.len()], receipt: vec![-1; position.len()], position }
}

fn set_table<T: Stored>(cache: &mut Cache<T>, slot: u32, pages: &[u32]) {
    cache.set_tables(slot as usize, &[Vec::new(), pages.to_vec()]).unwrap();
}

fn append<T: Stored>(
    device: &Device,
    heads: usize,
    qkv: &mut Buffer<f32>,
    list: &RowList,
    rope: &RopeTable,
    cache: &mut Cache<T>,
) {
    append_normed(device, heads, qkv, list, None, rope, cache);
}

fn append_normed<T: Stored>(
    device: &Device,
    heads: usize,
    qkv: &mut Buffer<f32>,
    list: &RowList,
    norms: Option<&QueryNorms>,
    rope: &RopeTable,
    cache: &mut Cache<T>,
) {
    let at = Rows::upload(device, list).unwrap();
    let rows = list.slot.len();
    let at = &at;
    let rope = Some(rope);
    let operands = RopeAppend { rows, heads, qkv, at, norms, rope, layer: LAYER, cache };
    rope_append(device, operands).unwrap();
}

/// The angles of plain rope.
fn table(device: &Device, head_dim: usize) -> RopeTable {
    let frequencies = Rope::plain(head_dim, THETA).frequencies;
    RopeTable::new(device, BLOCKS * PAGE, head_dim, &frequencies, 1.0).unwrap()
}

/// One shape of heads with the rows of a sequence.
struct Case {
    kv_heads: usize,
    heads: usize,
    head_dim: usize,
    soft_cap: Option<f32>,
    window: Option<usize>,
    /// (positions, (heads + 2 · `kv_heads`) · `head_dim`), before rope.
    qkv: Vec<f32>,
}

/// Nobody shares.
fn alone(_: u32) -> SharedPrefix {
    SharedPrefix::default()
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
        Self { kv_heads, heads, head_dim, soft_cap: None, window: None, qkv }
    }

    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// What scores are multiplied by: not always one over the root of the width.
    fn scale(&self) -> f32 {
        let usual = 1.0 / (self.head_dim as f32).sqrt();
        if self.soft_cap.is_some() { 0.75 * usual } else { usual }
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
            slots: 7,
            blocks: BLOCKS,
        };
        let mut cache = Cache::new(device, shape).unwrap();
        let pages: Vec<u32> = (0..BLOCKS).map(page).collect();
        for slot in [NOISE, SLOT] {
            set_table(&mut cache, slot, &pages);
        }
        self.noise(device, rope, 0..BLOCKS * PAGE, &mut cache);
        cache
    }

    /// Writes NaN to positions of the noise's pages.
    fn noise<T: Stored>(
        &self,
        device: &Device,
        rope: &RopeTable,
        positions: std::ops::Range<usize>,
        cache: &mut Cache<T>,
    ) {
        let mut noise = nans(device, positions.len() * 2 * self.kv_heads * self.head_dim);
        append(device, 0, &mut noise, &rows(NOISE, positions), rope, cache);
    }

    /// Rotated qkv of all positions, then the output of the last row of each length, while nothing
    /// but NaN is in the cache behind it, then the same rows in one batch over the full cache.
    fn run<T: Stored>(&self, device: &Device) -> Vec<Vec<f32>> {
        let rope = table(device, self.head_dim);
        let mut cache = self.cache::<T>(device, &rope);
        let (width, out_width) = (self.width(), self.out_width());
        let (mut rotated, mut alone) = (Vec::new(), Vec::new());
        let mut from = 0;
        for length in LENGTHS {
            let mut qkv = upload::<f32>(device, &self.qkv[from * width..length * width], 0);
            let at = rows(SLOT, from..length);
            append(device, self.heads, &mut qkv, &at, &rope, &mut cache);
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
        let list = rows(SLOT, lengths.iter().map(|length| length - 1));
        self.attend_rows(device, qkv, &list, alone, cache)
    }

    fn attend_rows<T: Stored>(
        &self,
        device: &Device,
        qkv: &Buffer<f32>,
        list: &RowList,
        shared: impl Fn(u32) -> SharedPrefix,
        cache: &Cache<T>,
    ) -> Vec<f32> {
        let count = list.slot.len();
        let state = self.heads * (256 + 2);
        let mut slots: Vec<u32> = list.slot.clone();
        slots.sort_unstable();
        slots.dedup();
        let mut plan = AttentionPlan::new(device, (count, slots.len()), state, true).unwrap();
        let group = self.heads / self.kv_heads;
        plan.set(&Items::build(list, group, plan.capacity(), shared)).unwrap();
        let mut out = nan_activations::<T>(device, count + 1, self.out_width());
        let operands = Attention {
            rows: count,
            heads: self.heads,
            qkv,
            at: &Rows::upload(device, list).unwrap(),
            plan: &mut plan,
            layer: LAYER,
            cache,
            scale: self.scale(),
            soft_cap: self.soft_cap,
            window: self.window,
            out: &mut out,
        };
        attention(device, operands).unwrap();
        let mut out = read_rows(&out);
        let beyond = out.split_off(count * self.out_width());
        assert!(beyond.iter().all(|v| v.is_nan()), "rows that are not active were written");
        out
    }

    fn check<T: Stored>(&self) {
        for (device, outputs) in on_every_device::<T>(0, |device| self.run::<T>(device)) {
            self.check_outputs::<T>(&device, &outputs);
        }
    }

    fn check_outputs<T: Stored>(&self, device: &str, outputs: &[Vec<f32>]) {
        let [rotated, alone, batch] = outputs else { panic!("three outputs") };
        assert_eq!(first_difference(alone, batch), None, "{device}: a row depends on others");
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
        // Kernels and products of pairs round queries and weights to bf16, half a unit in the last
        // place each; the weights in the sum and in the products.
        let are_rounded = device != "cpu";
        let weights = if are_rounded { T::ROUNDOFF } else { 0.0 };
        for (length, got) in LENGTHS.iter().zip(alone.chunks_exact(out_width)) {
            let query = &rotated[(length - 1) * width..][..out_width];
            let query: Vec<f64> = match are_rounded {
                true => query.iter().map(|&v| T::nearest(v)).collect(),
                false => widen(query),
            };
            let what = format!("{device}: {} of {} heads", self.kv_heads, self.heads);
            let what = format!("{what} of {}, {length} positions", self.head_dim);
            let first = length - self.window.unwrap_or(*length).min(*length);
            let seen = first..*length;
            let (want, size, error) = self.want(&query, &keys[seen.clone()], &values[seen]);
            for (at, &got) in got.iter().enumerate() {
                let (want, error) = (want[at], error[at] + weights * size[at]);
                let tolerance = error + T::ROUNDOFF * (want.abs() + error);
                close(&what, got, want, 1.01 * tolerance);
            }
        }
    }

    /// The output, the same of the values' sizes, and how far f32 may be from it. A score is a chain of `head_dim` products, one
    /// scaling and one subtraction, so a weight eˢ is off by the scores' error twice (its own and
    /// the sum's); the output is a chain of as many products as there are positions, with one
    /// rescaling (an exponential of two ulp) a tile.
    fn want(
        &self,
        query: &[f64],
        keys: &[Vec<f64>],
        values: &[Vec<f64>],
    ) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let (heads, kv_heads, head_dim) = (self.heads, self.kv_heads, self.head_dim);
        let (scale, cap) = (f64::from(self.scale()), self.soft_cap.map(f64::from));
        let want = attend(query, keys, values, (heads, kv_heads), scale, cap);
        let value_sizes: Vec<Vec<f64>> = values.iter().map(|row| sizes(row)).collect();
        let size = attend(query, keys, &value_sizes, (heads, kv_heads), scale, cap);
        let mut error = Vec::with_capacity(want.len());
        for (head, (q, size)) in
            query.chunks_exact(head_dim).zip(size.chunks_exact(head_dim)).enumerate()
        {
            let own = head / (heads / kv_heads) * head_dim;
            let score_size = |key: &Vec<f64>| -> f64 {
                key[own..][..head_dim].iter().zip(q).map(|(k, q)| (k * q).abs()).sum()
            };
            let largest = keys.iter().map(score_size).fold(0.0, f64::max);
            // A tensor core may drop what falls below the largest term of a step.
            let score_error = (2 * head_dim + 8) as f64 * U * largest * scale;
            // A capped score is off by a few ulp of the cap.
            let score_error = score_error + cap.map_or(0.0, |cap| 16.0 * U * cap);
            let tiles = keys.len().div_ceil(64);
            let chain = (keys.len() + 16 * tiles + 16) as f64 * U;
            error.extend(size.iter().map(|size| (2.0 * score_error + chain) * size));
        }
        (want, size, error)
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
    // Every width that kernels are compiled for, and more heads than a warp's 16 matrix rows.
    for (kv_heads, group, head_dim) in [(1, 8, 96), (1, 4, 128), (1, 1, 256), (1, 20, 32)] {
        Case::new(kv_heads, group, head_dim).check::<bf16>();
    }
}

/// Each query and key is divided by its root mean square before it is turned; values are not.
#[test]
fn queries_and_keys_are_normalised_before_they_are_turned() {
    const EPS: f32 = 1e-5;
    let shapes = [(2, 3, 16), (2, 2, 24), (1, 5, 80), (1, 1, 256), (3, 4, 8)];
    for ((kv_heads, group, head_dim), whole) in
        shapes.into_iter().flat_map(|shape| [(shape, false), (shape, true)])
    {
        let case = Case::new(kv_heads, group, head_dim);
        let (width, count, half) = (case.width(), 20, head_dim / 2);
        let mut numbers = Numbers::new(head_dim as u64);
        // All heads of a row are normalised together, or each by itself with the same gains.
        let widths =
            if whole { [case.heads * head_dim, kv_heads * head_dim] } else { [head_dim; 2] };
        let gains = widths.map(|width| numbers.with_outliers(width, 9.0));
        let outputs = on_every_device::<bf16>(0, |device| {
            let rope = table(device, head_dim);
            let mut cache = case.cache::<bf16>(device, &rope);
            let [q, k] = [0, 1].map(|i| upload::<f32>(device, &gains[i], 0));
            let norms = QueryNorms { q, k, eps: EPS, whole };
            let mut qkv = upload::<f32>(device, &case.qkv[..count * width], 0);
            let list = rows(SLOT, 0..count);
            append_normed(device, case.heads, &mut qkv, &list, Some(&norms), &rope, &mut cache);
            vec![read(&qkv)]
        });
        let turned = (case.heads + kv_heads) * head_dim;
        for (device, outputs) in outputs {
            let all = outputs[0].chunks_exact(width).zip(case.qkv.chunks_exact(width));
            for (position, (got, row)) in all.enumerate() {
                assert_eq!(first_difference(&got[turned..], &row[turned..]), None, "{device}: v");
                let (q, k) = row[..turned].split_at(case.heads * head_dim);
                let normed = [q, k].into_iter().zip(&gains).flat_map(|(values, gain)| {
                    let normed =
                        |values: &[f32]| rms_norm(&widen(values), &widen(gain), f64::from(EPS));
                    values.chunks_exact(gain.len()).flat_map(normed)
                });
                let normed: Vec<f64> = normed.collect();
                for (head, normed) in normed.chunks_exact(head_dim).enumerate() {
                    let mut want = normed.to_vec();
                    rope(&mut want, head_dim, position, THETA);
                    for (i, &want) in want.iter().enumerate() {
                        let size = normed[i % half].abs() + normed[i % half + half].abs();
                        // The norm's chain of squares, then the turn; angles are below 20.
                        let tolerance = (widths[0] + 16 + 4 + 4 * 20) as f64 * U * size;
                        let got = got[head * head_dim + i];
                        close(
                            &format_args!("{device} {position} {head} {i}"),
                            got,
                            want,
                            tolerance,
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn soft_caps_and_sliding_windows() {
    for (soft_cap, window) in [(Some(3.0), None), (None, Some(1)), (Some(30.0), Some(100))] {
        let case = Case { soft_cap, window, ..Case::new(2, 3, 16) };
        case.check::<f32>();
        case.check::<bf16>();
    }
    for window in [7, 64, 1030] {
        Case { window: Some(window), ..Case::new(1, 2, 16) }.check::<bf16>();
    }
}

/// Rows of two sequences whose tables share pages, in one batch, are the rows of each alone.
#[test]
fn sequences_of_a_batch_do_not_mix() {
    check_mixing::<f32>();
    check_mixing::<bf16>();
}

fn check_mixing<T: Stored>() {
    let case = Case::new(2, 3, 16);
    let width = case.width();
    on_every_device::<T>(0, |device| {
        let rope = table(device, case.head_dim);
        let mut cache = case.cache::<T>(device, &rope);
        // Slot 1 has other pages than slot 2 from the second block on.
        set_table(&mut cache, 1, &[page(0), page(69), page(70)]);
        let mut run = |list: &RowList, from: usize| {
            let rows = &case.qkv[from * width..][..list.slot.len() * width];
            let mut qkv = upload::<f32>(device, rows, 0);
            append(device, case.heads, &mut qkv, list, &rope, &mut cache);
            case.attend_rows(device, &qkv, list, alone, &cache)
        };
        run(&rows(SLOT, 0..16), 0);
        let (one, other) = (run(&rows(SLOT, 16..20), 16), run(&rows(1, 16..20), 30));
        // The same rows again, both sequences in one step.
        let both = [&case.qkv[16 * width..][..4 * width], &case.qkv[30 * width..][..4 * width]];
        let list = RowList {
            slot: vec![SLOT, SLOT, SLOT, SLOT, 1, 1, 1, 1],
            position: vec![16, 17, 18, 19, 16, 17, 18, 19],
            receipt: vec![-1; 8],
        };
        let mut qkv = upload::<f32>(device, &both.concat(), 0);
        append(device, case.heads, &mut qkv, &list, &rope, &mut cache);
        let together = case.attend_rows(device, &qkv, &list, alone, &cache);
        assert_eq!(first_difference(&together, &[&one[..], &other[..]].concat()), None);
        assert_ne!(one, other);
        vec![together]
    });
}

/// A sequence's rows have the same bits one by one, in runs of any length, and where the part that
/// they share with others is folded once for all of them.
#[test]
fn rows_do_not_depend_on_how_they_are_divided() {
    for (kv_heads, group) in [(2, 3), (1, 1), (1, 16)] {
        let case = Case::new(kv_heads, group, 16);
        let width = case.width();
        on_every_device::<bf16>(0, |device| {
            let rope = table(device, case.head_dim);
            let mut cache = case.cache::<bf16>(device, &rope);
            let mut qkv = upload::<f32>(device, &case.qkv, 0);
            append(device, case.heads, &mut qkv, &rows(SLOT, 0..POSITIONS), &rope, &mut cache);
            let rotated = read(&qkv);
            // Six slots with the same pages stand for six sequences that share.
            let sharers = [1, 3, 4, 5, 6, SLOT];
            let pages: Vec<u32> = (0..BLOCKS).map(page).collect();
            sharers.iter().for_each(|&slot| set_table(&mut cache, slot, &pages));
            for end in [70, 200, 1090] {
                let positions = end - 6..end;
                let queries = &rotated[positions.start * width..positions.end * width];
                let queries = upload::<f32>(device, queries, 0);
                let run = rows(SLOT, positions.clone());
                let in_a_run = case.attend_rows(device, &queries, &run, alone, &cache);
                let single = RowList { slot: sharers.to_vec(), ..run.clone() };
                let one_by_one = case.attend_rows(device, &queries, &single, alone, &cache);
                assert_eq!(first_difference(&in_a_run, &one_by_one), None, "{end}: a run");
                for tiles in (1..=(end - 6) / 64).filter(|tiles| tiles % 5 < 2) {
                    // The layer is at the cut, so what is above counts.
                    let (tiles_above, cut) = (tiles as u32, LAYER as u32);
                    let prefix = SharedPrefix { group: 1, tiles_below: 0, tiles_above, cut };
                    let shared = |slot| if slot == 3 { alone(slot) } else { prefix };
                    let together = case.attend_rows(device, &queries, &single, shared, &cache);
                    assert_eq!(first_difference(&together, &one_by_one), None, "{end}: {tiles}");
                    if end > 100 {
                        // Behind rows of another sequence, more than there are sharers.
                        let before = RowList {
                            slot: [vec![NOISE; 40], single.slot.clone()].concat(),
                            position: (0..40).chain(single.position.clone()).collect(),
                            receipt: vec![-1; 46],
                        };
                        let zeros = vec![0.0; 40 * width];
                        let rows = [&zeros[..], &rotated[(end - 6) * width..end * width]].concat();
                        let rows = upload::<f32>(device, &rows, 0);
                        let behind = case.attend_rows(device, &rows, &before, shared, &cache);
                        let behind = &behind[40 * case.out_width()..];
                        assert_eq!(first_difference(behind, &one_by_one), None, "{end}: {tiles}");
                    }
                }
            }
            vec![rotated]
        });
    }
}

/// Keys and values that are infinite, as after an injection that is far too strong, spoil the rows that see
/// them and none before. (The kernels multiply what they mask, so that rows of the same item are spoilt too.)
#[test]
fn what_a_row_does_not_see_is_nothing_to_it() {
    for (group, head_dim) in [(3, 16), (1, 64)] {
        let case = Case::new(1, group, head_dim);
        let (width, last) = (case.width(), 75);
        on_every_family::<bf16>(0, |device| {
            let rope = table(device, head_dim);
            let run = |infinite: std::ops::Range<usize>| {
                let mut cache = case.cache::<bf16>(device, &rope);
                let mut rows_of = case.qkv[..last * width].to_vec();
                let kv = 2 * case.kv_heads * head_dim;
                for at in infinite {
                    rows_of[(at + 1) * width - kv..(at + 1) * width].fill(f32::INFINITY);
                }
                let mut qkv = upload::<f32>(device, &rows_of, 0);
                let list = rows(SLOT, 0..last);
                append(device, case.heads, &mut qkv, &list, &rope, &mut cache);
                case.attend_rows(device, &qkv, &list, alone, &cache)
            };
            let want = run(0..0);
            for from in [1, 20, 63, 70] {
                let got = run(from..last);
                let (before, behind) = got.split_at(from * case.out_width());
                assert_eq!(first_difference(before, &want[..before.len()]), None, "from {from}");
                assert!(behind.iter().all(|v| v.is_nan()), "from {from}");
            }
            vec![want]
        });
    }
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
    on_every_device::<T>(0, |device| {
        let rope = table(device, case.head_dim);
        let mut cache = case.cache::<T>(device, &rope);
        let mut qkv = upload::<f32>(device, &case.qkv[..40 * width], 0);
        append(device, case.heads, &mut qkv, &rows(SLOT, 0..40), &rope, &mut cache);
        let last = upload::<f32>(device, &read(&qkv)[39 * width..], 0);
        let original = case.attend(device, &last, &[40], &cache);

        let copies = [[page(1), page(69)], [page(2), page(70)]];
        copy_pages(device, &copies, &mut cache).unwrap();
        assert_eq!(case.attend(device, &last, &[40], &cache), original, "the source is changed");
        // The original's second and third pages turn to noise; the fork has copies of them.
        case.noise(device, &rope, 16..48, &mut cache);
        let spoilt = case.attend(device, &last, &[40], &cache);
        assert!(spoilt.iter().all(|v| v.is_nan()));
        set_table(&mut cache, SLOT, &[page(0), page(69), page(70)]);
        let forked = case.attend(device, &last, &[40], &cache);
        assert_eq!(first_difference(&forked, &original), None);
        vec![forked]
    });
}
