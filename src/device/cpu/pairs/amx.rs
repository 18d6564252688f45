//! Tiles multiplied by AMX, in inline assembly.

use std::{
    arch::{asm, x86_64::__cpuid_count},
    cell::Cell,
    ops::Range,
    ptr,
    sync::OnceLock,
};

use half::bf16;

use super::{Ahead, Blocks, DEPTH, HalfTile, OfPages, PAGES, SIDE, STEPS, Sums, Tile};

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
const WHOLE: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

static FOR_PRODUCTS: Configuration = WHOLE;

/// For pages, by rows of the left side: tiles 0 to 4 and 6 have so many, of which 6 has the left
/// half, and tile 7 is the upper half of a right side: 16 elements of k.
static OF_PAGES: [Configuration; SIDE] = {
    let mut all = [const { Configuration { ..WHOLE } }; SIDE];
    let mut at = 0;
    while at < SIDE {
        let rows = at as u8 + 1;
        all[at].row_bytes[6] = 32;
        all[at].rows = [rows, rows, rows, rows, rows, 16, rows, 8, 0, 0, 0, 0, 0, 0, 0, 0];
        at += 1;
    }
    all
};

thread_local! {
    static CONFIGURED: Cell<*const Configuration> = const { Cell::new(ptr::null()) };
}

/// Configures the tiles of this thread, which keeps them so: nothing else here uses them.
///
/// # Safety
/// The tiles are granted.
unsafe fn configure(configuration: &'static Configuration) {
    if ptr::eq(CONFIGURED.replace(configuration), configuration) {
        return;
    }
    // SAFETY: granted (promised); the configuration is one of palette 1.
    unsafe {
        asm!(
            "ldtilecfg [{}]",
            in(reg) configuration,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, readonly),
        );
    }
}

/// The most tiles of k that all rows go through before the next ones: their weights stay in the L1
/// cache, beside what passes through of x. (Weights from memory for 64 and for 128 rows, on two cores of
/// a Xeon: 24 instead of 21 and 18 instead of 15 GB/s. What is read from the L2 cache seems to wait for
/// the buffers that fetching from memory needs.)
fn most_steps(blocks: usize) -> usize {
    match blocks {
        0..=2 => usize::MAX,
        3..=4 => 6,
        _ => STEPS,
    }
}

/// Two blocks of 16 rows at a time. The products go to `to`, and without it to `sums`, which is worked in.
///
/// # Safety
/// The tiles are granted; there are `steps` tiles, at least one, in each w, and for each of the sums
/// in x; as many blocks can be written to `to`.
pub unsafe fn multiply(
    steps: usize,
    x: Blocks<*const bf16>,
    w: [&[Tile]; 2],
    ahead: &mut Ahead,
    sums: &mut [[Sums; 2]],
    to: Option<Blocks<*mut f32>>,
) {
    // SAFETY: promised by the caller.
    unsafe { configure(&FOR_PRODUCTS) };
    let blocks = sums.len();
    let sums = Blocks::of_tiles(sums.as_mut_ptr().cast::<f32>(), (SIDE, 2));
    let passes = ahead.rows.div_ceil(2 * SIDE);
    let stride = steps.div_ceil(steps.div_ceil(most_steps(blocks)));
    let mut next: *const u8 = ahead.next.cast();
    for start in (0..steps).step_by(stride) {
        let end = steps.min(start + stride);
        let to = to.filter(|_| end == steps).unwrap_or(sums);
        for block in (0..blocks).step_by(2) {
            let pass = Pass {
                x: x.start.wrapping_add(block * x.block + start * x.step),
                x_row: x.row * size_of::<bf16>(),
                x_step: x.step * size_of::<bf16>(),
                x_block: x.block * size_of::<bf16>(),
                w: w.map(|w| w[start..end].as_ptr()),
                steps: end - start,
                next,
                from: (start > 0).then_some(sums.start.wrapping_add(block * sums.block)),
                to: to.start.wrapping_add(block * to.block),
                to_row: to.row * size_of::<f32>(),
                to_block: to.block * size_of::<f32>(),
                to_step: to.step * size_of::<f32>(),
            };
            macro_rules! of {
                ($lines:literal of $apart:literal) => {
                    // SAFETY: promised by the caller; the tiles lie inside.
                    unsafe {
                        if block + 1 == blocks {
                            pass.multiply_one::<$lines, $apart>();
                        } else {
                            pass.multiply_two::<$lines, $apart>();
                        }
                        next = next.wrapping_add($lines * $apart * (end - start));
                    }
                };
            }
            // 32 lines are two tiles of w. In a single pass the processor follows by itself, and each
            // fourth line is enough to have it begin early.
            match passes {
                1 => of!(8 of 256),
                2 | 3 => of!(16 of 64),
                4..=7 => of!(8 of 64),
                8..=15 => of!(4 of 64),
                _ => of!(2 of 64),
            }
        }
    }
    ahead.next = next.cast();
}

/// One or two blocks of 16 rows against 32 columns. Strides are in bytes.
struct Pass {
    x: *const bf16,
    x_row: usize,
    x_step: usize,
    x_block: usize,
    w: [*const Tile; 2],
    steps: usize,
    next: *const u8,
    to: *mut f32,
    to_row: usize,
    to_block: usize,
    to_step: usize,
    /// What the sums begin with, in tiles; zeros if there is nothing.
    from: Option<*const f32>,
}

impl Pass {
    /// 16 rows × 32 columns, in one piece of assembly, since the compiler knows nothing of what tiles
    /// hold between two. `LINES` are fetched a step, so many bytes apart.
    ///
    /// # Safety
    /// The tiles are granted and configured; x, w and `to` have what is multiplied.
    unsafe fn multiply_one<const LINES: usize, const APART: usize>(&self) {
        let to = [self.to, self.to.wrapping_byte_add(self.to_step)];
        // SAFETY: promised by the caller; each step reads one tile of every list. A fetch reads
        // nothing, wherever it points.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "test {from}, {from}",
                "jz 2f",
                "tileloadd tmm0, [{from} + {stride}*1]",
                "tileloadd tmm1, [{from} + {stride}*1 + 1024]",
                "2:",
                "tileloadd tmm4, [{x} + {x_row}*1]",
                "tileloadd tmm6, [{w0} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{w1} + {stride}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                ".rept {lines}",
                "prefetcht1 [{next}]",
                "add {next}, {apart}",
                ".endr",
                "add {x}, {x_step}",
                "add {w0}, 1024",
                "add {w1}, 1024",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{to0} + {to_row}*1], tmm0",
                "tilestored [{to1} + {to_row}*1], tmm1",
                x = inout(reg) self.x => _,
                x_row = in(reg) self.x_row,
                x_step = in(reg) self.x_step,
                w0 = inout(reg) self.w[0] => _,
                w1 = inout(reg) self.w[1] => _,
                stride = in(reg) STRIDE,
                steps = inout(reg) self.steps => _,
                next = inout(reg) self.next => _,
                to0 = in(reg) to[0],
                to1 = in(reg) to[1],
                to_row = in(reg) self.to_row,
                from = in(reg) self.from.unwrap_or(ptr::null()),
                lines = const LINES,
                apart = const APART,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// Likewise 32 rows × 32 columns: every tile that is loaded is used twice.
    ///
    /// # Safety
    /// As for [`Self::multiply_one`].
    unsafe fn multiply_two<const LINES: usize, const APART: usize>(&self) {
        let lower = self.to.wrapping_byte_add(self.to_block);
        let to = [self.to, lower].map(|to| [to, to.wrapping_byte_add(self.to_step)]);
        // SAFETY: as in `multiply_one`; where the sums go is looked up.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "test {from}, {from}",
                "jz 2f",
                "tileloadd tmm0, [{from} + {stride}*1]",
                "tileloadd tmm1, [{from} + {stride}*1 + 1024]",
                "tileloadd tmm2, [{from} + {stride}*1 + 2048]",
                "tileloadd tmm3, [{from} + {stride}*1 + 3072]",
                "2:",
                "tileloaddt1 tmm4, [{x0} + {x_row}*1]",
                "tileloadd tmm6, [{w0} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{w1} + {stride}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloaddt1 tmm5, [{x1} + {x_row}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                ".rept {lines}",
                "prefetcht1 [{next}]",
                "add {next}, {apart}",
                ".endr",
                "add {x0}, {x_step}",
                "add {x1}, {x_step}",
                "add {w0}, 1024",
                "add {w1}, 1024",
                "dec {steps}",
                "jnz 2b",
                "mov {x0}, [{to}]",
                "tilestored [{x0} + {to_row}*1], tmm0",
                "mov {x0}, [{to} + 8]",
                "tilestored [{x0} + {to_row}*1], tmm1",
                "mov {x0}, [{to} + 16]",
                "tilestored [{x0} + {to_row}*1], tmm2",
                "mov {x0}, [{to} + 24]",
                "tilestored [{x0} + {to_row}*1], tmm3",
                x0 = inout(reg) self.x => _,
                x1 = inout(reg) self.x.wrapping_byte_add(self.x_block) => _,
                x_row = in(reg) self.x_row,
                x_step = in(reg) self.x_step,
                w0 = inout(reg) self.w[0] => _,
                w1 = inout(reg) self.w[1] => _,
                stride = in(reg) STRIDE,
                steps = inout(reg) self.steps => _,
                next = inout(reg) self.next => _,
                to = in(reg) to.as_ptr(),
                to_row = in(reg) self.to_row,
                from = in(reg) self.from.unwrap_or(ptr::null()),
                lines = const LINES,
                apart = const APART,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

/// Bytes from a row of scores, or weights, of pages to the next.
const SCORES_STRIDE: usize = size_of::<[f32; PAGES * SIDE]>();
const WEIGHTS_STRIDE: usize = size_of::<[bf16; PAGES * SIDE]>();

/// # Safety
/// The tiles are granted; there are as many tiles in each of `keys` as in x, at least one; `rows` are
/// of a tile, at least one.
pub unsafe fn multiply_pages(
    rows: Range<usize>,
    x: &[Tile],
    keys: [&[Tile]; PAGES],
    scores: &mut OfPages<f32>,
) {
    // SAFETY: promised by the caller.
    unsafe { configure(&OF_PAGES[rows.len() - 1]) };
    // SAFETY: promised by the caller; each step reads one tile of every list, and four tiles side by
    // side are the scores.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{x} + {stride}*1]",
            "tileloadd tmm5, [{k0} + {stride}*1]",
            "tdpbf16ps tmm0, tmm4, tmm5",
            "tileloadd tmm5, [{k1} + {stride}*1]",
            "tdpbf16ps tmm1, tmm4, tmm5",
            "tileloadd tmm5, [{k2} + {stride}*1]",
            "tdpbf16ps tmm2, tmm4, tmm5",
            "tileloadd tmm5, [{k3} + {stride}*1]",
            "tdpbf16ps tmm3, tmm4, tmm5",
            "add {x}, 1024",
            "add {k0}, 1024",
            "add {k1}, 1024",
            "add {k2}, 1024",
            "add {k3}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{scores} + {scores_stride}*1], tmm0",
            "tilestored [{scores} + {scores_stride}*1 + 64], tmm1",
            "tilestored [{scores} + {scores_stride}*1 + 128], tmm2",
            "tilestored [{scores} + {scores_stride}*1 + 192], tmm3",
            x = inout(reg) x.as_ptr().cast::<[bf16; DEPTH]>().add(rows.start) => _,
            k0 = inout(reg) keys[0].as_ptr() => _,
            k1 = inout(reg) keys[1].as_ptr() => _,
            k2 = inout(reg) keys[2].as_ptr() => _,
            k3 = inout(reg) keys[3].as_ptr() => _,
            steps = inout(reg) x.len() => _,
            stride = in(reg) STRIDE,
            scores = in(reg) scores[rows.start..].as_mut_ptr(),
            scores_stride = in(reg) SCORES_STRIDE,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _,
            options(nostack),
        );
    }
}

/// # Safety
/// The tiles are granted; `rows` are of a tile, at least one; `out` has 16 rows, and every page, of
/// which `page` is the first's number, a half tile for each 16 of its columns.
pub unsafe fn add_pages(
    rows: Range<usize>,
    page: usize,
    weights: &OfPages<bf16>,
    values: &[&[HalfTile]],
    out: &mut [f32],
) {
    // SAFETY: promised by the caller.
    unsafe { configure(&OF_PAGES[rows.len() - 1]) };
    let mut pages = [ptr::null::<HalfTile>(); PAGES];
    pages.iter_mut().zip(values).for_each(|(to, page)| *to = page.as_ptr());
    let pages = &pages[..values.len()];
    if pages.is_empty() {
        return;
    }
    let width = out.len() / SIDE;
    let weights = weights.as_flattened()[(rows.start * PAGES + page) * SIDE..].as_ptr();
    let out = &mut out[rows.start * width..];
    let mut first = 0;
    while first < width {
        let (columns, add): (_, unsafe fn(_, _, _, _, _)) = match width - first {
            FOUR.. => (FOUR, add_four),
            _ => (SIDE, add_one),
        };
        // SAFETY: promised by the caller; the columns lie in a row.
        unsafe { add(weights, pages, first / SIDE, out[first..].as_mut_ptr(), width) };
        first += columns;
    }
}

/// The columns of four tiles.
const FOUR: usize = 4 * SIDE;

/// Adds to 4 × 16 columns, of the values those from `block` × 16 on. Rows of `out` are `width` apart.
///
/// # Safety
/// As for [`add_pages`], and the tiles are configured; there is a page, and all lies inside.
unsafe fn add_four(
    weights: *const bf16,
    pages: &[*const HalfTile],
    block: usize,
    out: *mut f32,
    width: usize,
) {
    // SAFETY: promised by the caller; each step reads 16 columns of the weights, and of the next
    // page four half tiles side by side.
    unsafe {
        asm!(
            "tileloadd tmm0, [{out} + {width}*1]",
            "tileloadd tmm1, [{out} + {width}*1 + 64]",
            "tileloadd tmm2, [{out} + {width}*1 + 128]",
            "tileloadd tmm3, [{out} + {width}*1 + 192]",
            "2:",
            "mov {page}, [{pages}]",
            "add {page}, {offset}",
            "tileloadd tmm6, [{weights} + {weights_stride}*1]",
            "tileloadd tmm7, [{page} + {stride}*1]",
            "tdpbf16ps tmm0, tmm6, tmm7",
            "tileloadd tmm7, [{page} + {stride}*1 + 512]",
            "tdpbf16ps tmm1, tmm6, tmm7",
            "tileloadd tmm7, [{page} + {stride}*1 + 1024]",
            "tdpbf16ps tmm2, tmm6, tmm7",
            "tileloadd tmm7, [{page} + {stride}*1 + 1536]",
            "tdpbf16ps tmm3, tmm6, tmm7",
            "add {weights}, 32",
            "add {pages}, 8",
            "dec {count}",
            "jnz 2b",
            "tilestored [{out} + {width}*1], tmm0",
            "tilestored [{out} + {width}*1 + 64], tmm1",
            "tilestored [{out} + {width}*1 + 128], tmm2",
            "tilestored [{out} + {width}*1 + 192], tmm3",
            out = in(reg) out,
            width = in(reg) width * size_of::<f32>(),
            weights = inout(reg) weights => _,
            weights_stride = in(reg) WEIGHTS_STRIDE,
            pages = inout(reg) pages.as_ptr() => _,
            count = inout(reg) pages.len() => _,
            offset = in(reg) block * size_of::<HalfTile>(),
            page = out(reg) _,
            stride = in(reg) STRIDE,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Likewise 16 columns.
///
/// # Safety
/// As for [`add_four`].
unsafe fn add_one(
    weights: *const bf16,
    pages: &[*const HalfTile],
    block: usize,
    out: *mut f32,
    width: usize,
) {
    // SAFETY: as in `add_four`, one half tile of a page.
    unsafe {
        asm!(
            "tileloadd tmm0, [{out} + {width}*1]",
            "2:",
            "mov {page}, [{pages}]",
            "add {page}, {offset}",
            "tileloadd tmm6, [{weights} + {weights_stride}*1]",
            "tileloadd tmm7, [{page} + {stride}*1]",
            "tdpbf16ps tmm0, tmm6, tmm7",
            "add {weights}, 32",
            "add {pages}, 8",
            "dec {count}",
            "jnz 2b",
            "tilestored [{out} + {width}*1], tmm0",
            out = in(reg) out,
            width = in(reg) width * size_of::<f32>(),
            weights = inout(reg) weights => _,
            weights_stride = in(reg) WEIGHTS_STRIDE,
            pages = inout(reg) pages.as_ptr() => _,
            count = inout(reg) pages.len() => _,
            offset = in(reg) block * size_of::<HalfTile>(),
            page = out(reg) _,
            stride = in(reg) STRIDE,
            out("tmm0") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
