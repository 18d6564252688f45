//! Tiles multiplied by AMX, in inline assembly.

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

/// Two blocks of 16 rows at a time.
///
/// # Safety
/// The tiles are granted; there are `steps` tiles, at least one, in each w and for each of the sums
/// in x.
pub unsafe fn multiply(steps: usize, x: &[Tile], w: [&[Tile]; 2], sums: &mut [[Sums; 2]]) {
    // SAFETY: promised by the caller.
    unsafe { configure() };
    for (x, sums) in x.chunks(2 * steps).zip(sums.chunks_mut(2)) {
        // SAFETY: likewise; x and sums are of one block or of two.
        unsafe {
            match sums {
                [sums] => multiply_one(steps, x, w, sums),
                _ => multiply_two(steps, [x, &x[steps..]], w, sums),
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
