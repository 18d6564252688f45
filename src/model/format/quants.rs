//! ggml's quantised blocks, one function each: a block's bytes to its numbers.
//!
//! d is a block's scale, m its minimum, both f16; q is a value's quant. `Q?_0` and `Q?_1` blocks
//! have 32 values. A "K" block has 256 in sub-blocks of 16 or 32, each with a small integer scale s
//! (and minimum t) of its own.

use half::f16;

/// Values in a block of the older formats.
pub(super) const BLOCK: usize = 32;
/// Values in a block of the K formats.
pub(super) const SUPER_BLOCK: usize = 256;

/// d, 16 bytes of nibbles: (q − 8)·d.
pub(super) fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    nibbles(&block[2..], out, |q, _| (f32::from(q) - 8.0) * d);
}

/// d, m, 16 bytes of nibbles: q·d + m.
pub(super) fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    nibbles(&block[4..], out, |q, _| f32::from(q) * d + m);
}

/// d, 32 fifth bits, 16 bytes of nibbles: (q − 16)·d.
pub(super) fn q5_0(block: &[u8], out: &mut [f32]) {
    let (d, fifths) = (half_at(block, 0), u32_at(block, 2));
    nibbles(&block[6..], out, |q, i| (f32::from(q | fifth_bit(fifths, i)) - 16.0) * d);
}

/// d, m, 32 fifth bits, 16 bytes of nibbles: q·d + m.
pub(super) fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m, fifths) = (half_at(block, 0), half_at(block, 2), u32_at(block, 4));
    nibbles(&block[8..], out, |q, i| f32::from(q | fifth_bit(fifths, i)) * d + m);
}

/// d, 32 signed bytes: q·d.
pub(super) fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (out, q) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(*q as i8) * d;
    }
}

/// 16 bytes with s (low nibble) and t (high), 64 bytes of two-bit quants, d, m: d·s·q − m·t.
pub(super) fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, rest) = block.split_at(16);
    let (quants, rest) = rest.split_at(64);
    let (d, m) = (half_at(rest, 0), half_at(rest, 2));
    for (i, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[i] & 15);
        let minimum = m * f32::from(scales[i] >> 4);
        let (bytes, shift) = crumbs(quants, i);
        for (out, byte) in out.iter_mut().zip(bytes) {
            *out = scale * f32::from(byte >> shift & 3) - minimum;
        }
    }
}

/// 32 bytes of third bits, 64 of two-bit quants, 12 of six-bit s, d: d·(s − 32)·(q − 4).
pub(super) fn q3_k(block: &[u8], out: &mut [f32]) {
    let (thirds, rest) = block.split_at(32);
    let (quants, rest) = rest.split_at(64);
    let (scales, rest) = rest.split_at(12);
    let d = half_at(rest, 0);
    for (i, out) in out.chunks_exact_mut(16).enumerate() {
        // The low nibbles of 8 bytes, then their high ones; the upper two bits in the last 4 bytes.
        let low = scales[i % 8] >> (i / 8 * 4) & 15;
        let high = scales[8 + i % 4] >> (i / 4 * 2) & 3;
        let scale = d * (f32::from(low | high << 4) - 32.0);
        let (bytes, shift) = crumbs(quants, i);
        let thirds = &thirds[i % 2 * 16..];
        for ((out, byte), third) in out.iter_mut().zip(bytes).zip(thirds) {
            let q = (byte >> shift & 3) | (third >> (i / 2) & 1) << 2;
            *out = scale * (f32::from(q) - 4.0);
        }
    }
}

/// d, m, 12 bytes of six-bit s and t, 128 bytes of nibbles: d·s·q − m·t.
pub(super) fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let (scales, quants) = block[4..].split_at(12);
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (s, t) = scale_and_minimum(scales, i);
        let (scale, minimum) = (d * f32::from(s), m * f32::from(t));
        let shift = i % 2 * 4;
        for (out, byte) in out.iter_mut().zip(&quants[i / 2 * 32..]) {
            *out = scale * f32::from(byte >> shift & 15) - minimum;
        }
    }
}

/// Likewise, with 32 bytes of fifth bits before the nibbles.
pub(super) fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let (scales, rest) = block[4..].split_at(12);
    let (fifths, quants) = rest.split_at(32);
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (s, t) = scale_and_minimum(scales, i);
        let (scale, minimum) = (d * f32::from(s), m * f32::from(t));
        let shift = i % 2 * 4;
        for ((out, byte), fifth) in out.iter_mut().zip(&quants[i / 2 * 32..]).zip(fifths) {
            let q = (byte >> shift & 15) | (fifth >> i & 1) << 4;
            *out = scale * f32::from(q) - minimum;
        }
    }
}

/// 128 bytes of low nibbles, 64 of upper two bits, 16 signed s, d: d·s·(q − 32).
pub(super) fn q6_k(block: &[u8], out: &mut [f32]) {
    let (nibbles, rest) = block.split_at(128);
    let (uppers, rest) = rest.split_at(64);
    let (scales, rest) = rest.split_at(16);
    let d = half_at(rest, 0);
    for (i, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[i] as i8);
        // 64 bytes hold the nibbles of 128 values: 64 low ones, then 64 high ones.
        let low = &nibbles[i / 8 * 64 + i % 4 * 16..];
        let low_shift = i / 4 % 2 * 4;
        let (upper, upper_shift) = crumbs(uppers, i);
        for ((out, low), upper) in out.iter_mut().zip(low).zip(upper) {
            let q = (low >> low_shift & 15) | (upper >> upper_shift & 3) << 4;
            *out = scale * (f32::from(q) - 32.0);
        }
    }
}

/// Quants of four bits and their places: the low nibbles are the block's first half, the high ones
/// its second.
fn nibbles(packed: &[u8], out: &mut [f32], value: impl Fn(u8, usize) -> f32) {
    let (low, high) = out.split_at_mut(BLOCK / 2);
    for (i, ((byte, low), high)) in packed.iter().zip(low).zip(high).enumerate() {
        *low = value(byte & 15, i);
        *high = value(byte >> 4, i + BLOCK / 2);
    }
}

/// The bit above a nibble.
fn fifth_bit(fifths: u32, i: usize) -> u8 {
    ((fifths >> i & 1) << 4) as u8
}

/// The 16 bytes with the two-bit numbers of sub-block `i`, and their shift: 32 bytes hold 128
/// values, the lowest bits the first 32, and so on.
fn crumbs(packed: &[u8], i: usize) -> (&[u8], usize) {
    (&packed[i / 8 * 32 + i % 2 * 16..][..16], i % 8 / 2 * 2)
}

/// Sub-block `i`'s s and t of eight each in 12 bytes: four s, four t, whose upper two bits are
/// those of the other four, whose nibbles (s low, t high) are the last four bytes.
fn scale_and_minimum(packed: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        return (packed[i] & 63, packed[i + 4] & 63);
    }
    let nibbles = packed[i + 4];
    ((nibbles & 15) | packed[i - 4] >> 6 << 4, (nibbles >> 4) | packed[i] >> 6 << 4)
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn u32_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_q4_0_block_is_halves_of_nibbles() {
        let mut block = vec![0x00, 0x40]; // d = 2
        block.extend((0..16u8).map(|i| i | (15 - i) << 4));
        let mut out = [f32::NAN; BLOCK];
        q4_0(&block, &mut out);
        let low = (0..16).map(|i| (i as f32 - 8.0) * 2.0);
        let high = (0..16).map(|i| (7.0 - i as f32) * 2.0);
        assert_eq!(out.to_vec(), low.chain(high).collect::<Vec<f32>>());
    }

    #[test]
    fn six_bit_scales_are_put_together() {
        // Of sub-blocks 0, 3, 4 and 7, packed by hand.
        let mut packed = [0u8; 12];
        (packed[0], packed[4]) = (0x11, 0x2e);
        (packed[3], packed[7]) = (0x04, 0x3b);
        packed[0] |= 0b10 << 6; // upper bits of s 4
        packed[4] |= 0b01 << 6; // upper bits of t 4
        packed[8] = 0x95; // s 4 ends in 5, t 4 in 9
        packed[7] |= 0b11 << 6;
        packed[11] = 0xf0;
        assert_eq!(scale_and_minimum(&packed, 0), (0x11, 0x2e));
        assert_eq!(scale_and_minimum(&packed, 3), (0x04, 0x3b));
        assert_eq!(scale_and_minimum(&packed, 4), (0x25, 0x19));
        assert_eq!(scale_and_minimum(&packed, 7), (0x00, 0x3f));
    }
}
