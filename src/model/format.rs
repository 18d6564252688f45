//! How numbers are stored in checkpoints, and their exact value in f32.

use half::{bf16, f16};

/// A storage format of tensor rows: blocks of `values` numbers in `bytes` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    Bf16,
    /// ggml: a scale d (f16) and 32 signed bytes q; q·d.
    Q8_0,
    /// ggml: a scale d (f16) and 32 nibbles q; (q − 8)·d.
    Q4_0,
    /// ggml: a scale d and a minimum m (f16) and 32 nibbles q; q·d + m.
    Q4_1,
}

/// Values in a block of ggml's quantised formats.
const BLOCK: usize = 32;

impl Format {
    /// Its name in safetensors and ggml.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
        }
    }

    /// Numbers in a block.
    pub fn block_values(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => BLOCK,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 2 + BLOCK,
            Self::Q4_0 => 2 + BLOCK / 2,
            Self::Q4_1 => 4 + BLOCK / 2,
        }
    }

    /// Bytes of a tensor of whole rows of `cols` numbers each; `None` where a row is not a whole
    /// number of blocks or the size does not fit into 64 bits.
    pub fn bytes(self, rows: usize, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_values()) {
            return None;
        }
        (cols / self.block_values()).checked_mul(self.block_bytes())?.checked_mul(rows)
    }

    /// Writes the stored numbers as f32. Nothing is rounded, but for q·d + m, which is rounded once.
    ///
    /// # Panics
    ///
    /// Where `data` is not as long as `out.len()` numbers in this format.
    pub fn dequantise(self, data: &[u8], out: &mut [f32]) {
        assert_eq!(Some(data.len()), self.bytes(1, out.len()), "length of a {} row", self.name());
        match self {
            Self::F32 => each(data, out, f32::from_le_bytes),
            Self::F16 => each(data, out, |b| f16::from_le_bytes(b).to_f32()),
            Self::Bf16 => each(data, out, |b| bf16::from_le_bytes(b).to_f32()),
            Self::Q8_0 => blocks(data, out, self, |block, out| {
                let d = half_at(block, 0);
                for (out, q) in out.iter_mut().zip(&block[2..]) {
                    *out = f32::from(*q as i8) * d;
                }
            }),
            Self::Q4_0 => blocks(data, out, self, |block, out| {
                let d = half_at(block, 0);
                nibbles(&block[2..], out, |q| (f32::from(q) - 8.0) * d);
            }),
            Self::Q4_1 => blocks(data, out, self, |block, out| {
                let (d, m) = (half_at(block, 0), half_at(block, 2));
                nibbles(&block[4..], out, |q| f32::from(q) * d + m);
            }),
        }
    }
}

fn each<const N: usize>(data: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    for (bytes, out) in data.as_chunks::<N>().0.iter().zip(out) {
        *out = value(*bytes);
    }
}

fn blocks(data: &[u8], out: &mut [f32], format: Format, value: impl Fn(&[u8], &mut [f32])) {
    for (block, out) in data.chunks_exact(format.block_bytes()).zip(out.chunks_exact_mut(BLOCK)) {
        value(block, out);
    }
}

/// The low nibbles are the block's first half, the high ones its second.
fn nibbles(packed: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    let (low, high) = out.split_at_mut(BLOCK / 2);
    for ((byte, low), high) in packed.iter().zip(low).zip(high) {
        *low = value(byte & 15);
        *high = value(byte >> 4);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(format: Format, data: &[u8], n: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; n];
        format.dequantise(data, &mut out);
        out
    }

    #[test]
    fn plain_formats_keep_their_value() {
        let data: Vec<u8> = [1.5f32, -0.1].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(row(Format::F32, &data, 2), [1.5, -0.1]);
        // 0x3c01 is 1 + 2^-10, 0x0001 the smallest subnormal 2^-24, 0xc000 is -2.
        let data = [0x01, 0x3c, 0x01, 0x00, 0x00, 0xc0];
        assert_eq!(row(Format::F16, &data, 3), [1.000_976_6, 2f32.powi(-24), -2.0]);
        // 0x3f81 is 1 + 2^-7.
        assert_eq!(row(Format::Bf16, &[0x81, 0x3f], 1), [1.007_812_5]);
    }

    #[test]
    fn q8_0_is_a_signed_byte_times_the_scale() {
        let mut block = vec![0x00, 0x38]; // d = 0.5
        block.extend((0..32).map(|i| (i as i8 - 16) as u8));
        let want: Vec<f32> = (0..32).map(|i| (i as f32 - 16.0) * 0.5).collect();
        assert_eq!(row(Format::Q8_0, &block, 32), want);
    }

    #[test]
    fn q4_0_is_a_nibble_less_eight_times_the_scale() {
        let mut block = vec![0x00, 0x40]; // d = 2
        block.extend((0..16u8).map(|i| i | (15 - i) << 4));
        let low = (0..16).map(|i| (i as f32 - 8.0) * 2.0);
        let high = (0..16).map(|i| (7.0 - i as f32) * 2.0);
        assert_eq!(row(Format::Q4_0, &block, 32), low.chain(high).collect::<Vec<f32>>());
    }

    #[test]
    fn q4_1_adds_the_minimum_and_blocks_follow_each_other() {
        let mut data = vec![0x00, 0x40, 0x00, 0xbc]; // d = 2, m = -1
        data.extend([0xf0u8; 16]);
        data.extend([0x00, 0x38, 0x00, 0x00]); // d = 0.5, m = 0
        data.extend([0x21u8; 16]);
        let out = row(Format::Q4_1, &data, 64);
        assert_eq!(out[..16], [-1.0; 16]);
        assert_eq!(out[16..32], [29.0; 16]);
        assert_eq!(out[32..48], [0.5; 16]);
        assert_eq!(out[48..], [1.0; 16]);
    }

    #[test]
    fn sizes_are_whole_blocks_and_do_not_overflow() {
        assert_eq!(Format::Q4_1.bytes(3, 64), Some(120));
        assert_eq!(Format::Q4_1.bytes(3, 65), None);
        assert_eq!(Format::F32.bytes(usize::MAX, 2), None);
    }
}
