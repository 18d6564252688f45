//! AMX: products of tiles of bfloat16, by the processor's instructions or by the same arithmetic
//! written out. A tile is 16 rows of 64 bytes.

use half::bf16;

use super::{Isa, Kernel};

/// Rows of a tile, and its columns of four bytes: an f32, or a pair of bf16.
pub(crate) const SIDE: usize = 16;
/// Elements of k in a tile.
pub(crate) const DEPTH: usize = 2 * SIDE;
/// A tile of bf16: of x `[row][k]`, of w `[k / 2][column][k % 2]`.
pub(crate) type Tile = [bf16; SIDE * DEPTH];
/// A tile of sums, `[row][column]`.
pub(crate) type Sums = [[f32; SIDE]; SIDE];

/// `sums[r][c] = Σ x[r][t] · w[c][t]` over all tiles t, one step of k after another: for R · 16 rows
/// and twice 16 columns. A row's bits do not depend on the others.
pub(crate) fn multiply<const R: usize>(
    isa: Isa,
    x: [&[Tile]; R],
    w: [&[Tile]; 2],
    sums: &mut [[Sums; 2]; R],
) {
    let steps = w[0].len();
    assert!(steps > 0 && w[1].len() == steps && x.iter().all(|x| x.len() == steps), "tiles of k");
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Cpu` is made only with an instruction set that `Isa::check` found here, so the
        // tiles were granted; all lists have as many tiles (asserted above).
        Isa::Amx => unsafe { hardware::multiply(steps, x, w, sums) },
        _ => isa.run(Emulated { x, w, sums }),
    }
}

struct Emulated<'a, const R: usize> {
    x: [&'a [Tile]; R],
    w: [&'a [Tile]; 2],
    sums: &'a mut [[Sums; 2]; R],
}

impl<const R: usize> Kernel for Emulated<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (x, sums) in self.x.iter().zip(self.sums) {
            for (w, sums) in self.w.iter().zip(sums) {
                *sums = [[0.0; SIDE]; SIDE];
                x.iter().zip(*w).for_each(|(x, w)| add_product(x, w, sums));
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
fn add_product(x: &Tile, w: &Tile, sums: &mut Sums) {
    // By element of k.
    let mut columns = [[0.0f32; SIDE]; DEPTH];
    for (pair, w) in w.as_chunks::<DEPTH>().0.iter().enumerate() {
        for column in 0..SIDE {
            columns[2 * pair][column] = widen(w[2 * column]);
            columns[2 * pair + 1][column] = widen(w[2 * column + 1]);
        }
    }
    for (x, sums) in x.as_chunks::<DEPTH>().0.iter().zip(sums) {
        let mut chains = [[0.0f32; SIDE]; 2];
        for (at, &x) in x.iter().enumerate() {
            let x = widen(x);
            for column in 0..SIDE {
                let sum = &mut chains[at % 2][column];
                *sum = flush(x.mul_add(columns[at][column], *sum));
            }
        }
        for column in 0..SIDE {
            sums[column] = flush(sums[column] + flush(chains[0][column] + chains[1][column]));
        }
    }
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

/// Whether this processor has the instructions, and the system lets this process use them.
#[cfg(target_arch = "x86_64")]
pub(super) fn is_granted() -> bool {
    hardware::is_granted()
}

#[cfg(target_arch = "x86_64")]
mod hardware {
    use std::{
        arch::{asm, x86_64::__cpuid_count},
        cell::Cell,
        sync::OnceLock,
    };

    use super::{Sums, Tile};

    /// Bytes from a row of a tile to the next.
    const STRIDE: usize = 64;

    /// Asks the processor, then the system: Linux gives a process the tiles' state on request.
    pub fn is_granted() -> bool {
        static GRANTED: OnceLock<bool> = OnceLock::new();
        *GRANTED.get_or_init(|| has_instructions() && request())
    }

    fn has_instructions() -> bool {
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        let wanted = AMX_BF16 | AMX_TILE;
        #[allow(unused_unsafe, reason = "it is unsafe in older compilers")]
        // SAFETY: every x86-64 processor has the instruction.
        let (last, features) = unsafe { (__cpuid_count(0, 0).eax, __cpuid_count(7, 0).edx) };
        last >= 7 && features & wanted == wanted
    }

    #[cfg(target_os = "linux")]
    fn request() -> bool {
        const ARCH_PRCTL: usize = 158;
        const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
        const XFEATURE_XTILEDATA: usize = 18;
        let result: isize;
        // SAFETY: the system call takes numbers only, and changes nothing but what is permitted; it
        // overwrites rcx and r11.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") ARCH_PRCTL => result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XFEATURE_XTILEDATA,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack),
            );
        }
        result == 0
    }

    #[cfg(not(target_os = "linux"))]
    fn request() -> bool {
        false
    }

    /// What `ldtilecfg` reads.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        /// Bytes of a row, by tile.
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }
    const _: () = assert!(size_of::<Configuration>() == 64, "as ldtilecfg reads it");

    /// All eight tiles whole.
    static CONFIGURATION: Configuration = Configuration {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    thread_local! {
        static CONFIGURED: Cell<bool> = const { Cell::new(false) };
    }

    /// Configures the tiles of this thread, which keeps them so: nothing else here uses them.
    ///
    /// # Safety
    /// The tiles are granted.
    unsafe fn configure() {
        if CONFIGURED.replace(true) {
            return;
        }
        // SAFETY: granted (promised); the configuration is one of palette 1.
        unsafe {
            asm!(
                "ldtilecfg [{}]",
                in(reg) &raw const CONFIGURATION,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, readonly),
            );
        }
    }

    /// # Safety
    /// The tiles are granted; every list has `steps` tiles, at least one.
    pub unsafe fn multiply<const R: usize>(
        steps: usize,
        x: [&[Tile]; R],
        w: [&[Tile]; 2],
        sums: &mut [[Sums; 2]; R],
    ) {
        // SAFETY: promised by the caller.
        unsafe { configure() };
        for at in (0..R).step_by(2) {
            let (x, sums) = (&x[at..], &mut sums[at..]);
            // SAFETY: likewise; the sums of one or two row blocks are that many pairs of tiles.
            unsafe {
                match x.len() {
                    1 => multiply_one(steps, x[0], w, &mut sums[0]),
                    _ => multiply_two(steps, [x[0], x[1]], w, sums),
                }
            }
        }
    }

    /// 16 rows × 32 columns, in one piece of assembly, since the compiler knows nothing of what
    /// tiles hold between two.
    ///
    /// # Safety
    /// The tiles are granted and configured; every list has `steps` tiles, at least one.
    unsafe fn multiply_one(steps: usize, x: &[Tile], w: [&[Tile]; 2], sums: &mut [Sums; 2]) {
        // SAFETY: promised by the caller; each step reads one tile of every list, and the two tiles
        // of sums are whole.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm4, [{x} + {stride}*1]",
                "tileloadd tmm6, [{w0} + {stride}*1]",
                "tileloadd tmm7, [{w1} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {x}, 1024",
                "add {w0}, 1024",
                "add {w1}, 1024",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{sums} + {stride}*1], tmm0",
                "tilestored [{sums} + {stride}*1 + 1024], tmm1",
                x = inout(reg) x.as_ptr() => _,
                w0 = inout(reg) w[0].as_ptr() => _,
                w1 = inout(reg) w[1].as_ptr() => _,
                steps = inout(reg) steps => _,
                stride = in(reg) STRIDE,
                sums = in(reg) sums.as_mut_ptr(),
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// Likewise 32 rows × 32 columns: every tile that is loaded is used twice.
    ///
    /// # Safety
    /// As for [`multiply_one`]; `sums` has two pairs of tiles.
    unsafe fn multiply_two(steps: usize, x: [&[Tile]; 2], w: [&[Tile]; 2], sums: &mut [[Sums; 2]]) {
        // SAFETY: as in `multiply_one`.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{x0} + {stride}*1]",
                "tileloadd tmm5, [{x1} + {stride}*1]",
                "tileloadd tmm6, [{w0} + {stride}*1]",
                "tileloadd tmm7, [{w1} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {x0}, 1024",
                "add {x1}, 1024",
                "add {w0}, 1024",
                "add {w1}, 1024",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{sums} + {stride}*1], tmm0",
                "tilestored [{sums} + {stride}*1 + 1024], tmm1",
                "tilestored [{sums} + {stride}*1 + 2048], tmm2",
                "tilestored [{sums} + {stride}*1 + 3072], tmm3",
                x0 = inout(reg) x[0].as_ptr() => _,
                x1 = inout(reg) x[1].as_ptr() => _,
                w0 = inout(reg) w[0].as_ptr() => _,
                w1 = inout(reg) w[1].as_ptr() => _,
                steps = inout(reg) steps => _,
                stride = in(reg) STRIDE,
                sums = in(reg) sums.as_mut_ptr(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
