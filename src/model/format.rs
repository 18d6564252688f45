//! How numbers are stored in checkpoints, and their exact value in f32.

mod quants;

use half::{bf16, f16};

use self::quants::{BLOCK, SUPER_BLOCK};

/// A storage format of tensor rows: blocks of `values` numbers in `bytes` bytes. The quantised ones
/// are ggml's; `format/quants.rs` tells their layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    Bf16,
    /// 4 bits, a scale for 32.
    Q4_0,
    /// 4 bits, a scale and a minimum for 32.
    Q4_1,
    /// 5 bits, a scale for 32.
    Q5_0,
    /// 5 bits, a scale and a minimum for 32.
    Q5_1,
    /// 8 bits, a scale for 32.
    Q8_0,
    /// 2 bits, a scale and a minimum for 16.
    Q2K,
    /// 3 bits, a scale for 16.
    Q3K,
    /// 4 bits, a scale and a minimum for 32.
    Q4K,
    /// 5 bits, a scale and a minimum for 32.
    Q5K,
    /// 6 bits, a scale for 16.
    Q6K,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// Its name in safetensors and ggml.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// The format of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Numbers in a block.
    pub fn block_values(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => BLOCK,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => SUPER_BLOCK,
        }
    }

    /// Bytes of a block: its f16 scales (and minima), then what each value and sub-block takes.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 2 + BLOCK / 2,
            Self::Q4_1 => 4 + BLOCK / 2,
            Self::Q5_0 => 2 + BLOCK / 8 + BLOCK / 2,
            Self::Q5_1 => 4 + BLOCK / 8 + BLOCK / 2,
            Self::Q8_0 => 2 + BLOCK,
            Self::Q2K => 4 + SUPER_BLOCK / 16 + SUPER_BLOCK / 4,
            Self::Q3K => 2 + 12 + SUPER_BLOCK / 8 + SUPER_BLOCK / 4,
            Self::Q4K => 4 + 12 + SUPER_BLOCK / 2,
            Self::Q5K => 4 + 12 + SUPER_BLOCK / 8 + SUPER_BLOCK / 2,
            Self::Q6K => 2 + SUPER_BLOCK / 16 + SUPER_BLOCK / 4 + SUPER_BLOCK / 2,
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

    /// Writes the stored numbers as f32. Products are exact: a scale has at most 11 bits, a
    /// sub-block's factor 8, a quant 6. Only where a minimum is added or taken off is a value
    /// rounded, once, as ggml does it.
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
            Self::Q4_0 => self.blocks(data, out, quants::q4_0),
            Self::Q4_1 => self.blocks(data, out, quants::q4_1),
            Self::Q5_0 => self.blocks(data, out, quants::q5_0),
            Self::Q5_1 => self.blocks(data, out, quants::q5_1),
            Self::Q8_0 => self.blocks(data, out, quants::q8_0),
            Self::Q2K => self.blocks(data, out, quants::q2_k),
            Self::Q3K => self.blocks(data, out, quants::q3_k),
            Self::Q4K => self.blocks(data, out, quants::q4_k),
            Self::Q5K => self.blocks(data, out, quants::q5_k),
            Self::Q6K => self.blocks(data, out, quants::q6_k),
        }
    }

    /// Block by block.
    fn blocks(self, data: &[u8], out: &mut [f32], dequantise: impl Fn(&[u8], &mut [f32])) {
        let blocks = data.chunks_exact(self.block_bytes());
        for (block, out) in blocks.zip(out.chunks_exact_mut(self.block_values())) {
            dequantise(block, out);
        }
    }
}

fn each<const N: usize>(data: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    for (bytes, out) in data.as_chunks::<N>().0.iter().zip(out) {
        *out = value(*bytes);
    }
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

    /// Random blocks and their values by the reference (`scripts/make_golden.py quants`).
    #[test]
    fn every_format_has_the_reference_s_bits() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/quants/blocks.safetensors");
        let file = fs_err::read(path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&file).unwrap();
        for format in Format::ALL {
            let tensor = |part: &str| file.tensor(&format!("{}.{part}", format.name())).unwrap();
            let want: Vec<u32> = tensor("values")
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|bytes| u32::from_le_bytes(*bytes))
                .collect();
            assert!(want.len() >= 2 * format.block_values(), "{}", format.name());
            let got = row(format, tensor("bytes").data(), want.len());
            for (index, (got, want)) in got.iter().zip(want).enumerate() {
                let expected = f32::from_bits(want);
                assert_eq!(
                    got.to_bits(),
                    want,
                    "{} value {index}: {got}, not {expected}",
                    format.name()
                );
            }
        }
    }

    #[test]
    fn every_format_is_found_by_its_name() {
        for format in Format::ALL {
            assert_eq!(Format::named(format.name()), Some(format));
        }
        assert_eq!(Format::named("Q8_K"), None);
    }

    #[test]
    fn sizes_are_whole_blocks_and_do_not_overflow() {
        assert_eq!(Format::Q4_1.bytes(3, 64), Some(120));
        assert_eq!(Format::Q4_1.bytes(3, 65), None);
        assert_eq!(Format::Q6K.bytes(2, 512), Some(840));
        assert_eq!(Format::Q6K.bytes(2, 288), None);
        assert_eq!(Format::F32.bytes(usize::MAX, 2), None);
    }
}
