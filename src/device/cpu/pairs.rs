//! Products of bfloat16 in pairs of k, as AMX's tiles and AVX-512's dot products multiply them: by the
//! processor's instructions or by the same arithmetic written out. A tile is 16 rows of 64 bytes.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod dot;

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

/// The most rows and panels of [`multiply_few`]: 24 sums.
pub(crate) const FEW: (usize, usize) = (3, 8);

/// `sums[r][c] = Σ x[r][t] · w[c][t]` over all tiles t, one step of k after another, for `rows` rows
/// and twice 16 columns. x: `[rows / 16][steps]`; sums: `[rows / 16]`, what its last rows beyond
/// `rows` become is open. A row's bits do not depend on the others. `next` is where the weights start
/// that will be wanted after these; they may be fetched to a cache meanwhile.
pub(crate) fn multiply(
    isa: Isa,
    rows: usize,
    x: &[Tile],
    w: [&[Tile]; 2],
    next: *const Tile,
    sums: &mut [[Sums; 2]],
) {
    let steps = w[0].len();
    assert!(steps > 0 && w[1].len() == steps && sums.len() == rows.div_ceil(SIDE), "tiles");
    assert_eq!(x.len(), sums.len() * steps, "tiles of x");
    #[cfg(not(target_arch = "x86_64"))]
    let _ = next;
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Cpu` is made only with an instruction set that `Isa::check` found here, so the
        // tiles were granted; their numbers were checked.
        Isa::Amx => unsafe { amx::multiply(steps, x, w, sums) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: likewise.
        Isa::Avx512Bf16 => unsafe { dot::multiply(steps, rows, x, w, next, sums) },
        _ => isa.run(Emulated { products: isa.products(), x, w, sums }),
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
                x.iter().zip(*w).for_each(|(x, w)| match self.products {
                    Tiles => add_tile(x, w, sums),
                    Pairs => add_pairs(x, w, sums),
                    Chains => unreachable!("chains are not made of tiles"),
                });
            }
        }
    }
}

/// `tdpbf16ps` as the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, defines
/// it: chains of fused multiply-adds of the even and of the odd elements of k, each from zero, then
/// their sum is added. Rounded to nearest, ties to even; denormals are zero, as operands and as
/// results. (A result is denormal here after its rounding to f32. The manual leaves open whether one
/// that this rounding carries to the smallest normal number counts.)
#[inline(always)]
fn add_tile(x: &Tile, w: &Tile, sums: &mut Sums) {
    let columns = by_element(w);
    for (x, sums) in x.as_chunks::<DEPTH>().0.iter().zip(sums) {
        let mut chains = [[0.0f32; SIDE]; 2];
        for (at, &x) in x.iter().enumerate() {
            add(x, &columns[at], &mut chains[at % 2]);
        }
        for column in 0..SIDE {
            sums[column] = flush(sums[column] + flush(chains[0][column] + chains[1][column]));
        }
    }
}

/// `vdpbf16ps` as the same manual defines it: of each pair of k first the odd element's product is
/// added, then the even one's, both fused. Rounding and denormals as above.
#[inline(always)]
fn add_pairs(x: &Tile, w: &Tile, sums: &mut Sums) {
    let columns = by_element(w);
    for (x, sums) in x.as_chunks::<DEPTH>().0.iter().zip(sums) {
        for (x, columns) in x.as_chunks::<2>().0.iter().zip(columns.as_chunks::<2>().0) {
            add(x[1], &columns[1], sums);
            add(x[0], &columns[0], sums);
        }
    }
}

#[inline(always)]
fn add(x: bf16, w: &[f32; SIDE], sums: &mut [f32; SIDE]) {
    let x = widen(x);
    for (sum, &w) in sums.iter_mut().zip(w) {
        *sum = flush(x.mul_add(w, *sum));
    }
}

/// A tile of w in f32, `[k][column]`.
#[inline(always)]
fn by_element(w: &Tile) -> [[f32; SIDE]; DEPTH] {
    let mut columns = [[0.0; SIDE]; DEPTH];
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
