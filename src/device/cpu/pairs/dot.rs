//! Tiles multiplied by AVX-512's dot products of pairs, `vdpbf16ps`.

use std::arch::x86_64::{
    __m512, __m512bh, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32,
    _mm512_setzero_ps, _mm512_storeu_ps,
};

use std::ops::Range;

use half::bf16;

use super::{Ahead, DEPTH, HalfTile, LINE, OfPages, PAGES, SIDE, Sums, Tile, fetch};

/// Two elements of k.
type Pair = [bf16; 2];
/// A pair for each of 16 columns.
type Lanes = [Pair; SIDE];

/// Rows of a register tile: with 16 × 2 columns 16 sums, which hide an addition's latency, beside
/// the weights and a pair of x.
const ROWS: usize = 8;

/// What is fetched while something else is multiplied.
struct Fetch {
    next: *const [u8; LINE],
    /// Lines for every tile of k.
    lines: usize,
}

impl Fetch {
    #[inline(always)]
    fn step(&mut self) {
        for _ in 0..self.lines {
            fetch(self.next);
            self.next = self.next.wrapping_add(1);
        }
    }
}

/// The most tiles of k that all rows go through before the next ones: their weights stay in the L1
/// cache.
const STEPS: usize = 12;

/// # Safety
/// The processor has AVX-512 with bfloat16; there are `steps` tiles in each w and for each of the
/// sums in x, and sums for `rows`.
pub unsafe fn multiply(
    steps: usize,
    rows: usize,
    x: &[Tile],
    w: [&[Tile]; 2],
    ahead: &mut Ahead,
    sums: &mut [[Sums; 2]],
) {
    // All of them by the last row of the last step.
    let lines = (2 * size_of::<Tile>() / LINE).div_ceil(ahead.rows.div_ceil(ROWS));
    let mut fetch = Fetch { next: ahead.next.cast(), lines };
    let stride = if rows <= ROWS { steps } else { steps.div_ceil(steps.div_ceil(STEPS)) };
    for start in (0..steps).step_by(stride) {
        let end = steps.min(start + stride);
        let w = w.map(|w| &w[start..end]);
        for first in (0..rows).step_by(ROWS) {
            let (block, row) = (first / SIDE, first % SIDE);
            let (x, sums) = (&x[block * steps..][start..end], &mut sums[block]);
            macro_rules! of {
                ($rows:literal) => {
                    // SAFETY: promised by the caller; the rows lie inside the block.
                    unsafe { multiply_rows::<$rows>(start == 0, row, x, w, &mut fetch, sums) }
                };
            }
            match rows - first {
                1 => of!(1),
                2 => of!(2),
                3 => of!(3),
                4 => of!(4),
                5 => of!(5),
                6 => of!(6),
                7 => of!(7),
                _ => of!(8),
            }
        }
    }
    ahead.next = fetch.next.cast();
}

/// Adds to `N` rows, from `row` on, × 32 columns; to zero if it `is_first`.
///
/// # Safety
/// The processor has AVX-512 with bfloat16; there are as many tiles in x and each w; a tile has the
/// rows.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn multiply_rows<const N: usize>(
    is_first: bool,
    row: usize,
    x: &[Tile],
    w: [&[Tile]; 2],
    fetch: &mut Fetch,
    sums: &mut [Sums; 2],
) {
    let mut tile = [[_mm512_setzero_ps(); 2]; N];
    if !is_first {
        for (at, tile) in tile.iter_mut().enumerate() {
            // SAFETY: a register is the 16 sums of a row.
            *tile = unsafe { [0, 1].map(|side| _mm512_loadu_ps(sums[side][row + at].as_ptr())) };
        }
    }
    let [mut left, mut right] = w.map(|w| w.as_ptr().cast::<Lanes>());
    let mut pairs = x.as_ptr().cast::<Pair>().wrapping_add(row * SIDE);
    for _ in 0..x.len() {
        fetch.step();
        for pair in 0..SIDE {
            // SAFETY: a tile of w has 16 times 16 pairs, one of x 16 rows of 16 pairs.
            unsafe {
                let w = [load(left.add(pair)), load(right.add(pair))];
                for (at, tile) in tile.iter_mut().enumerate() {
                    let x = broadcast(pairs.add(at * SIDE + pair));
                    *tile = [dot(tile[0], x, w[0]), dot(tile[1], x, w[1])];
                }
            }
        }
        left = left.wrapping_add(SIDE);
        right = right.wrapping_add(SIDE);
        pairs = pairs.wrapping_add(SIDE * DEPTH / 2);
    }
    for (at, tile) in tile.into_iter().enumerate() {
        for (sums, tile) in sums.iter_mut().zip(tile) {
            // SAFETY: as for the loads.
            unsafe { _mm512_storeu_ps(sums[row + at].as_mut_ptr(), tile) };
        }
    }
}

/// Few rows, of one tile, against up to 8 panels of 16 columns at a time: as many streams of weights
/// come from memory faster than two (a single stream of tokens on two cores of a Zen 4: 128 instead
/// of 114 a second).
///
/// # Safety
/// The processor has AVX-512 with bfloat16; there are `steps` tiles in x and for each of the sums in
/// w; rows and panels are at most [`super::FEW`].
pub unsafe fn multiply_few(
    steps: usize,
    rows: usize,
    x: &[Tile],
    mut w: &[Tile],
    mut sums: &mut [Sums],
) {
    while !sums.is_empty() {
        macro_rules! of {
            ($rows:literal, $panels:literal) => {
                // SAFETY: promised by the caller; there are that many panels.
                unsafe { multiply_panels::<$rows, $panels>(steps, x, w, sums) }
            };
        }
        let panels = match (rows, sums.len()) {
            (1, 8..) => of!(1, 8),
            (2, 8..) => of!(2, 8),
            (_, 8..) => of!(3, 8),
            (1, 4..) => of!(1, 4),
            (2, 4..) => of!(2, 4),
            (_, 4..) => of!(3, 4),
            (1, 2..) => of!(1, 2),
            (2, 2..) => of!(2, 2),
            (_, 2..) => of!(3, 2),
            (1, _) => of!(1, 1),
            (2, _) => of!(2, 1),
            _ => of!(3, 1),
        };
        (w, sums) = (&w[panels * steps..], &mut sums[panels..]);
    }
}

/// `N` rows against `P` panels; how many they are.
///
/// # Safety
/// The processor has AVX-512 with bfloat16; there are `steps` tiles in x and in each of `P` panels,
/// and as many sums.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn multiply_panels<const N: usize, const P: usize>(
    steps: usize,
    x: &[Tile],
    w: &[Tile],
    sums: &mut [Sums],
) -> usize {
    let mut tile = [[_mm512_setzero_ps(); P]; N];
    let mut panel = w.as_ptr().cast::<Lanes>();
    let mut pairs = x.as_ptr().cast::<Pair>();
    for _ in 0..steps {
        for pair in 0..SIDE {
            // SAFETY: a tile of w has 16 times 16 pairs, one of x 16 rows of 16 pairs.
            unsafe {
                let w: [_; P] = std::array::from_fn(|at| load(panel.add(at * steps * SIDE + pair)));
                for (at, tile) in tile.iter_mut().enumerate() {
                    let x = broadcast(pairs.add(at * SIDE + pair));
                    for (sum, w) in tile.iter_mut().zip(w) {
                        *sum = dot(*sum, x, w);
                    }
                }
            }
        }
        panel = panel.wrapping_add(SIDE);
        pairs = pairs.wrapping_add(SIDE * DEPTH / 2);
    }
    for (row, tile) in tile.into_iter().enumerate() {
        for (sums, tile) in sums.iter_mut().zip(tile) {
            // SAFETY: a register is the 16 sums of a row.
            unsafe { _mm512_storeu_ps(sums[row].as_mut_ptr(), tile) };
        }
    }
    P
}

/// Rows of a register tile over four pages, or four times 16 columns of their values.
const FOUR: usize = 4;

/// Calls `$kernel::<N, …>` for groups of up to [`FOUR`] of `$rows`, with the first row of each.
macro_rules! by_four {
    ($rows:expr, |$row:ident| $kernel:ident::<_ $(, $more:literal)?>$arguments:tt) => {
        for $row in $rows.clone().step_by(FOUR) {
            match $rows.end - $row {
                1 => $kernel::<1 $(, $more)?>$arguments,
                2 => $kernel::<2 $(, $more)?>$arguments,
                3 => $kernel::<3 $(, $more)?>$arguments,
                _ => $kernel::<FOUR $(, $more)?>$arguments,
            }
        }
    };
}

/// # Safety
/// The processor has AVX-512 with bfloat16; there are as many tiles in each of `keys` as in x; `rows`
/// are of a tile.
pub unsafe fn multiply_pages(
    rows: Range<usize>,
    x: &[Tile],
    keys: [&[Tile]; PAGES],
    scores: &mut OfPages<f32>,
) {
    // SAFETY: promised by the caller; there are as many rows from `row` on.
    unsafe { by_four!(rows, |row| multiply_keys::<_>(row, x, keys, scores)) }
}

/// `N` rows, from `row` on.
///
/// # Safety
/// As for [`multiply_pages`].
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn multiply_keys<const N: usize>(
    row: usize,
    x: &[Tile],
    keys: [&[Tile]; PAGES],
    scores: &mut OfPages<f32>,
) {
    let mut tile = [[_mm512_setzero_ps(); PAGES]; N];
    for (step, x) in x.iter().enumerate() {
        let pairs = x.as_ptr().cast::<Pair>().wrapping_add(row * SIDE);
        let keys = keys.map(|keys| keys[step].as_ptr().cast::<Lanes>());
        for pair in 0..SIDE {
            // SAFETY: a tile of keys has 16 times 16 pairs, one of x 16 rows of 16 pairs.
            unsafe {
                let keys = keys.map(|keys| load(keys.add(pair)));
                for (at, tile) in tile.iter_mut().enumerate() {
                    let x = broadcast(pairs.add(at * SIDE + pair));
                    tile.iter_mut().zip(keys).for_each(|(sum, key)| *sum = dot(*sum, x, key));
                }
            }
        }
    }
    for (tile, scores) in tile.into_iter().zip(&mut scores[row..]) {
        for (tile, scores) in tile.into_iter().zip(scores.as_chunks_mut::<SIDE>().0) {
            // SAFETY: a register is the scores of a page.
            unsafe { _mm512_storeu_ps(scores.as_mut_ptr(), tile) };
        }
    }
}

/// # Safety
/// The processor has AVX-512 with bfloat16; `rows` are of a tile, `out` has 16 rows, and every page a
/// half tile for each 16 of its columns.
pub unsafe fn add_pages(
    rows: Range<usize>,
    page: usize,
    weights: &OfPages<bf16>,
    values: &[&[HalfTile]],
    out: &mut [f32],
) {
    let blocks = out.len() / (SIDE * SIDE);
    let wide = blocks / FOUR * FOUR;
    // SAFETY: promised by the caller; there are as many rows from `row` on, and as many columns.
    unsafe {
        for block in (0..wide).step_by(FOUR) {
            by_four!(rows, |row| add_values::<_, 4>(row, block, page, weights, values, out));
        }
        for block in wide..blocks {
            by_four!(rows, |row| add_values::<_, 1>(row, block, page, weights, values, out));
        }
    }
}

/// `N` rows, from `row` on, and `B` times 16 columns, from `block` × 16 on; `first` is the first page's
/// number.
///
/// # Safety
/// As for [`add_pages`]; there are so many rows and columns.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn add_values<const N: usize, const B: usize>(
    row: usize,
    block: usize,
    first: usize,
    weights: &OfPages<bf16>,
    values: &[&[HalfTile]],
    out: &mut [f32],
) {
    let width = out.len() / SIDE;
    let mut tile = [[_mm512_setzero_ps(); B]; N];
    for (at, tile) in tile.iter_mut().enumerate() {
        let out = &out[(row + at) * width + block * SIDE..][..B * SIDE];
        for (tile, out) in tile.iter_mut().zip(out.as_chunks::<SIDE>().0) {
            // SAFETY: a register is 16 columns.
            *tile = unsafe { _mm512_loadu_ps(out.as_ptr()) };
        }
    }
    for (page, values) in values.iter().enumerate() {
        let values = values[block..][..B].as_ptr().cast::<Lanes>();
        for pair in 0..SIDE / 2 {
            // SAFETY: a half tile has 8 times 16 pairs, and a row of weights 8 pairs a page.
            unsafe {
                let values: [_; B] =
                    std::array::from_fn(|at| load(values.add(at * SIDE / 2 + pair)));
                for (weights, tile) in weights[row..].iter().zip(&mut tile) {
                    let pairs = weights.as_ptr().cast::<Pair>();
                    let x = broadcast(pairs.add((first + page) * SIDE / 2 + pair));
                    tile.iter_mut().zip(values).for_each(|(sum, value)| *sum = dot(*sum, x, value));
                }
            }
        }
    }
    for (at, tile) in tile.into_iter().enumerate() {
        let out = &mut out[(row + at) * width + block * SIDE..][..B * SIDE];
        for (tile, out) in tile.into_iter().zip(out.as_chunks_mut::<SIDE>().0) {
            // SAFETY: as for the loads.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), tile) };
        }
    }
}

/// # Safety
/// The 16 pairs can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn load(at: *const Lanes) -> __m512bh {
    // SAFETY: the load is promised by the caller; both types are 512 bits, and any bits are numbers.
    unsafe { std::mem::transmute(_mm512_loadu_si512(at.cast())) }
}

/// # Safety
/// The pair can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn broadcast(at: *const Pair) -> __m512bh {
    // SAFETY: as for `load`.
    unsafe { std::mem::transmute(_mm512_set1_epi32(std::mem::transmute::<Pair, i32>(*at))) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot(sum: __m512, x: __m512bh, w: __m512bh) -> __m512 {
    _mm512_dpbf16_ps(sum, x, w)
}
