//! Products of bfloat16 in pairs of k, as AMX's tiles and AVX-512's dot products multiply them: by the
//! processor's instructions or by the same arithmetic written out. A tile is 16 rows of 64 bytes.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod dot;

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};

use half::bf16;

use super::{
    Isa, Kernel,
    isa::Products::{self, Chains, Pairs, Tiles},
};

/// Rows of a tile, and its columns of four bytes: an f32, or a pair of bf16.
pub(crate) const SIDE: usize = 16;
/// Elements of k in a tile.
pub(crate) const DEPTH: usize = 2 * SIDE;
/// A tile of bf16: of x `[row][k]`, of w `[k / 2][column][k % 2]`.
pub(crate) type Tile = [bf16; SIDE * DEPTH];
/// A tile of sums, `[row][column]`.
pub(crate) type Sums = [[f32; SIDE]; SIDE];

/// Pages of 16 positions that are multiplied at a time.
pub(crate) const PAGES: usize = 4;
/// What 16 rows have for the positions of those pages: scores, or weights.
pub(crate) type OfPages<T> = [[T; PAGES * SIDE]; SIDE];
/// 16 columns of a page's values, `[position / 2][column][position % 2]`.
pub(crate) type HalfTile = [bf16; SIDE * SIDE];

/// Tiles of k whose weights for 32 columns stay in the L1 cache of a processor with AMX, beside what
/// passes through of x.
pub(crate) const STEPS: usize = 18;

/// The most rows and panels of [`multiply_few`]: 24 sums.
pub(crate) const FEW: (usize, usize) = (3, 8);

/// Where blocks of 16 rows are, in elements.
#[derive(Clone, Copy)]
pub(crate) struct Blocks<P> {
    pub(crate) start: P,
    /// From a row to the next.
    pub(crate) row: usize,
    /// From one tile's elements of a row to the next's.
    pub(crate) step: usize,
    /// From a block to the next.
    pub(crate) block: usize,
}

impl<P> Blocks<P> {
    /// Tiles, as many as a block has `steps`.
    fn of_tiles(start: P, (columns, steps): (usize, usize)) -> Self {
        let step = SIDE * columns;
        Self { start, row: columns, step, block: steps * step }
    }

    /// Rows of so many elements one behind the other.
    fn of_rows(start: P, columns: usize, row: usize) -> Self {
        Self { start, row, step: columns, block: SIDE * row }
    }
}

/// x of a product, in blocks of 16 rows.
#[derive(Clone, Copy)]
pub(crate) enum Left<'a> {
    /// `[rows / 16][steps]`.
    Tiles(&'a [Tile]),
    /// (rows in whole blocks, 32 · steps): what rows beyond those of the product hold is open. Only
    /// [`reads_rows`] can.
    Rows(&'a [bf16]),
}

/// Weights that will be wanted after those of a product: fetched to the L2 cache meanwhile, as many.
pub(crate) struct Ahead {
    next: *const Tile,
    /// Of the whole product, over which the fetching is spread.
    rows: usize,
}

impl Ahead {
    /// For a product of so many rows, in one call of [`multiply`] or several. Nothing is read: `next`
    /// may point anywhere.
    pub(crate) fn new(next: *const Tile, rows: usize) -> Self {
        Self { next, rows }
    }
}

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Fetches a line to the L2 cache. Nothing is read: it may point anywhere.
#[inline(always)]
pub(crate) fn fetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    #[allow(unused_unsafe, reason = "it is unsafe in older compilers")]
    // SAFETY: a prefetch reads nothing, wherever it points.
    unsafe {
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Whether products are of rows as they are.
pub(crate) fn reads_rows(isa: Isa) -> bool {
    isa == Isa::Amx
}

/// `sums[r][c] = Σ x[r][t] · w[c][t]` over all tiles t, one step of k after another, for `rows` rows
/// and twice 16 columns. sums: `[rows / 16]`, what its last rows beyond `rows` become is open. A row's
/// bits do not depend on the others.
pub(crate) fn multiply(
    isa: Isa,
    rows: usize,
    x: Left,
    w: [&[Tile]; 2],
    ahead: &mut Ahead,
    sums: &mut [[Sums; 2]],
) {
    let (steps, blocks) = (w[0].len(), rows.div_ceil(SIDE));
    assert!(steps > 0 && w[1].len() == steps && sums.len() == blocks, "tiles");
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Amx {
        // SAFETY: a `Cpu` is made only with an instruction set that `Isa::check` found here, so the
        // tiles were granted; their numbers are checked.
        return unsafe { amx::multiply(steps, x.blocks(steps, blocks), w, ahead, sums, None) };
    }
    let Left::Tiles(x) = x else { unreachable!("only AMX reads rows") };
    assert!(x.len() >= blocks * steps, "tiles of x");
    let x = &x[..blocks * steps];
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ahead;
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: likewise.
        Isa::Avx512Bf16 => unsafe { dot::multiply(steps, rows, x, w, ahead, sums) },
        _ => isa.run(Emulated { products: isa.products(), x, w, sums }),
    }
}

/// As [`multiply`] for whole blocks, by AMX: (rows, 32) of rows that are `row` elements long are written
/// to `out`.
///
/// # Safety
/// `out` can be written there, and nobody else reads or writes it meanwhile.
pub(crate) unsafe fn multiply_into(
    isa: Isa,
    x: Left,
    w: [&[Tile]; 2],
    ahead: &mut Ahead,
    sums: &mut [[Sums; 2]],
    (out, row): (*mut f32, usize),
) {
    let (steps, blocks) = (w[0].len(), sums.len());
    assert!(reads_rows(isa) && steps > 0 && w[1].len() == steps, "tiles");
    let (x, to) = (x.blocks(steps, blocks), Blocks::of_rows(out, SIDE, row));
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as in `multiply`; the caller promises the rest.
    unsafe {
        amx::multiply(steps, x, w, ahead, sums, Some(to));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (x, ahead, to);
}

impl Left<'_> {
    /// Without the first `blocks`.
    pub(crate) fn behind(self, blocks: usize, steps: usize) -> Self {
        match self {
            Self::Tiles(x) => Self::Tiles(&x[blocks * steps..]),
            Self::Rows(x) => Self::Rows(&x[blocks * SIDE * steps * DEPTH..]),
        }
    }

    /// Of a product of so many.
    fn blocks(self, steps: usize, blocks: usize) -> Blocks<*const bf16> {
        match self {
            Self::Tiles(x) => {
                assert!(x.len() >= blocks * steps, "tiles of x");
                Blocks::of_tiles(x.as_ptr().cast(), (DEPTH, steps))
            }
            Self::Rows(x) => {
                assert!(x.len() >= blocks * SIDE * steps * DEPTH, "rows of x");
                Blocks::of_rows(x.as_ptr(), DEPTH, steps * DEPTH)
            }
        }
    }
}

/// Whether [`multiply_few`] is for a product of so many rows.
pub(crate) fn is_few(isa: Isa, rows: usize) -> bool {
    isa == Isa::Avx512Bf16 && rows <= FEW.0
}

/// As [`multiply`], for few rows (see [`is_few`]) and up to [`FEW`] panels of 16 columns. w: `[panels][steps]`;
/// sums: `[panels]`.
pub(crate) fn multiply_few(isa: Isa, rows: usize, x: &[Tile], w: &[Tile], sums: &mut [Sums]) {
    let steps = x.len();
    assert!(steps > 0 && is_few(isa, rows) && sums.len() <= FEW.1, "few rows");
    assert_eq!(w.len(), sums.len() * steps, "tiles of w");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: `is_few` says that the instruction set, which `Isa::check` found here, is the one; the
    // lengths were checked.
    unsafe {
        dot::multiply_few(steps, rows, x, w, sums);
    }
}

/// `scores[r][16 p + c] = Σ x[r][t] · keys[p][c][t]` as in [`multiply`], for `rows` of a tile; the other
/// rows are left alone. x, keys[p]: `[steps]`.
pub(crate) fn multiply_pages(
    isa: Isa,
    rows: Range<usize>,
    x: &[Tile],
    keys: [&[Tile]; PAGES],
    scores: &mut OfPages<f32>,
) {
    let steps = x.len();
    assert!(steps > 0 && keys.iter().all(|keys| keys.len() == steps), "tiles of keys");
    assert!(rows.start < rows.end && rows.end <= SIDE, "rows of a tile");
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as in `multiply`; the numbers were checked.
        Isa::Amx => unsafe { amx::multiply_pages(rows, x, keys, scores) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: likewise.
        Isa::Avx512Bf16 => unsafe { dot::multiply_pages(rows, x, keys, scores) },
        _ => isa.run(EmulatedKeys { products: isa.products(), rows, x, keys, scores }),
    }
}

/// `out[r][c] += Σ weights[r][16 (first + p) + l] · values[p][l][c]`, page after page, each in one step of
/// 16, for `rows` of a tile; the other rows are left alone. values[p]: `[columns / 16]`; out: (16,
/// columns).
pub(crate) fn add_pages(
    isa: Isa,
    rows: Range<usize>,
    first: usize,
    weights: &OfPages<bf16>,
    values: &[&[HalfTile]],
    out: &mut [f32],
) {
    let blocks = out.len() / (SIDE * SIDE);
    assert!(first + values.len() <= PAGES, "pages");
    assert!(rows.start < rows.end && rows.end <= SIDE, "rows of a tile");
    assert!(values.iter().all(|values| values.len() == blocks), "tiles of values");
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as in `multiply`; the numbers were checked.
        Isa::Amx => unsafe { amx::add_pages(rows, first, weights, values, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: likewise.
        Isa::Avx512Bf16 => unsafe { dot::add_pages(rows, first, weights, values, out) },
        _ => {
            isa.run(EmulatedValues { products: isa.products(), rows, first, weights, values, out });
        }
    }
}

struct Emulated<'a> {
    products: Products,
    x: &'a [Tile],
    w: [&'a [Tile]; 2],
    sums: &'a mut [[Sums; 2]],
}

impl Kernel for Emulated<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (x, sums) in self.x.chunks(self.w[0].len()).zip(self.sums) {
            for (w, sums) in self.w.iter().zip(sums) {
                *sums = [[0.0; SIDE]; SIDE];
                for (x, w) in x.iter().zip(*w) {
                    let columns: [_; DEPTH] = by_element(w);
                    for (x, sums) in x.as_chunks::<DEPTH>().0.iter().zip(&mut *sums) {
                        add_products(self.products, x, &columns, sums);
                    }
                }
            }
        }
    }
}

struct EmulatedKeys<'a> {
    products: Products,
    rows: Range<usize>,
    x: &'a [Tile],
    keys: [&'a [Tile]; PAGES],
    scores: &'a mut OfPages<f32>,
}

impl Kernel for EmulatedKeys<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (page, keys) in self.keys.into_iter().enumerate() {
            for (step, (x, keys)) in self.x.iter().zip(keys).enumerate() {
                let columns: [_; DEPTH] = by_element(keys);
                for row in self.rows.clone() {
                    let scores = &mut self.scores[row].as_chunks_mut::<SIDE>().0[page];
                    if step == 0 {
                        *scores = [0.0; SIDE];
                    }
                    let x = &x.as_chunks::<DEPTH>().0[row];
                    add_products(self.products, x, &columns, scores);
                }
            }
        }
    }
}

struct EmulatedValues<'a> {
    products: Products,
    rows: Range<usize>,
    first: usize,
    weights: &'a OfPages<bf16>,
    values: &'a [&'a [HalfTile]],
    out: &'a mut [f32],
}

impl Kernel for EmulatedValues<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let width = self.out.len() / SIDE;
        for (page, values) in self.values.iter().enumerate() {
            for (block, values) in values.iter().enumerate() {
                let columns: [_; SIDE] = by_element(values);
                for row in self.rows.clone() {
                    let weights = &self.weights[row][(self.first + page) * SIDE..][..SIDE];
                    let out = &mut self.out[row * width..][..width];
                    let sums = &mut out.as_chunks_mut::<SIDE>().0[block];
                    add_products(self.products, weights, &columns, sums);
                }
            }
        }
    }
}

/// Adds the products of one step, x against the elements of k of 16 columns.
#[inline(always)]
fn add_products(products: Products, x: &[bf16], w: &[[f32; SIDE]], sums: &mut [f32; SIDE]) {
    match products {
        Tiles => add_tile(x, w, sums),
        Pairs => add_pairs(x, w, sums),
        Chains => unreachable!("chains are not made of tiles"),
    }
}

/// `tdpbf16ps` as the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, defines
/// it: chains of fused multiply-adds of the even and of the odd elements of k, each from zero, then
/// their sum is added. Rounded to nearest, ties to even; denormals are zero, as operands and as
/// results. (A result is denormal here after its rounding to f32. The manual leaves open whether one
/// that this rounding carries to the smallest normal number counts.)
#[inline(always)]
fn add_tile(x: &[bf16], w: &[[f32; SIDE]], sums: &mut [f32; SIDE]) {
    let mut chains = [[0.0f32; SIDE]; 2];
    for (at, (&x, w)) in x.iter().zip(w).enumerate() {
        add(x, w, &mut chains[at % 2]);
    }
    for column in 0..SIDE {
        sums[column] = flush(sums[column] + flush(chains[0][column] + chains[1][column]));
    }
}

/// `vdpbf16ps` as the same manual defines it: of each pair of k first the odd element's product is
/// added, then the even one's, both fused. Rounding and denormals as above.
#[inline(always)]
fn add_pairs(x: &[bf16], w: &[[f32; SIDE]], sums: &mut [f32; SIDE]) {
    for (x, w) in x.as_chunks::<2>().0.iter().zip(w.as_chunks::<2>().0) {
        add(x[1], &w[1], sums);
        add(x[0], &w[0], sums);
    }
}

#[inline(always)]
fn add(x: bf16, w: &[f32; SIDE], sums: &mut [f32; SIDE]) {
    let x = widen(x);
    for (sum, &w) in sums.iter_mut().zip(w) {
        *sum = flush(x.mul_add(w, *sum));
    }
}

/// A tile of w, or half of one, in f32: `[k][column]`.
#[inline(always)]
fn by_element<const K: usize>(w: &[bf16]) -> [[f32; SIDE]; K] {
    let mut columns = [[0.0; SIDE]; K];
    for (pair, w) in w.as_chunks::<DEPTH>().0.iter().enumerate() {
        for column in 0..SIDE {
            columns[2 * pair][column] = widen(w[2 * column]);
            columns[2 * pair + 1][column] = widen(w[2 * column + 1]);
        }
    }
    columns
}

#[inline(always)]
fn widen(value: bf16) -> f32 {
    flush(f32::from_bits(u32::from(value.to_bits()) << 16))
}

/// Zero in place of a denormal.
#[inline(always)]
fn flush(value: f32) -> f32 {
    if value.abs() < f32::MIN_POSITIVE { 0.0f32.copysign(value) } else { value }
}

/// Whether this processor has AMX with bfloat16, and the system lets this process use it.
#[cfg(target_arch = "x86_64")]
pub(super) fn amx_is_granted() -> bool {
    amx::is_granted()
}
