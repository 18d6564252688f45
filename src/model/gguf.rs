//! GGUF, versions 2 and 3: metadata and where each tensor's bytes stand.
//!
//! Layout, little endian: magic, version (u32), tensor count and metadata count (u64); metadata
//! (key, type, value); tensor records (name, dimensions with the row length first, type, offset);
//! padding to the alignment; tensor data. Every count, length and offset is checked against the
//! file's size before it is believed.

pub mod parts;

use std::{collections::BTreeMap, ops::Range};

use super::format::Format;
use crate::error::{Context, Error, Result};

/// The parsed header of a GGUF file.
#[derive(Debug)]
pub struct Gguf {
    metadata: BTreeMap<String, Value>,
    /// By their names in the file.
    pub tensors: BTreeMap<String, TensorRecord>,
}

/// One tensor of a GGUF file.
#[derive(Debug, PartialEq, Eq)]
pub struct TensorRecord {
    /// Row length last, as elsewhere in this crate.
    pub shape: Vec<usize>,
    /// How its numbers are stored.
    pub format: Format,
    /// Where its bytes stand in the file.
    pub bytes: Range<usize>,
}

/// A metadata value. Integers of all widths are one, so are the two floats.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Vec<Value>),
}

/// More array entries in all than any vocabulary has: a count beyond it is damage.
const MAX_ENTRIES: u64 = 1 << 23;
/// ggml tensors have one to four dimensions.
const MAX_DIMENSIONS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
const DAMAGED: &str = "the file is truncated or its header is damaged";

/// Names of ggml's tensor types by number, for messages.
const TYPE_NAMES: [&str; 40] = [
    "F32",
    "F16",
    "Q4_0",
    "Q4_1",
    "Q4_2",
    "Q4_3",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q8_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_K",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ3_XXS",
    "IQ1_S",
    "IQ4_NL",
    "IQ3_S",
    "IQ2_S",
    "IQ4_XS",
    "I8",
    "I16",
    "I32",
    "I64",
    "F64",
    "IQ1_M",
    "BF16",
    "Q4_0_4_4",
    "Q4_0_4_8",
    "Q4_0_8_8",
    "TQ1_0",
    "TQ2_0",
    "IQ4_NL_4_4",
    "IQ4_NL_4_8",
    "IQ4_NL_8_8",
    "MXFP4",
];

/// A file of texts, counts and one-dimensional f32 tensors (version 3, little endian).
pub fn write<'a>(
    texts: &[(&str, &str)],
    counts: &[(&str, u32)],
    tensors: impl Iterator<Item = (String, &'a [f32])>,
) -> Vec<u8> {
    const UINT32: u32 = 4;
    const STRING: u32 = 8;
    const F32: u32 = 0;
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    let tensors: Vec<_> = tensors.collect();
    let mut out = b"GGUF".to_vec();
    out.extend(3_u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend(((texts.len() + counts.len()) as u64).to_le_bytes());
    for (key, value) in texts {
        text(&mut out, key);
        out.extend(STRING.to_le_bytes());
        text(&mut out, value);
    }
    for (key, value) in counts {
        text(&mut out, key);
        out.extend(UINT32.to_le_bytes());
        out.extend(value.to_le_bytes());
    }
    let mut data = Vec::new();
    for (name, values) in &tensors {
        data.resize(data.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
        text(&mut out, name);
        out.extend(1_u32.to_le_bytes());
        out.extend((values.len() as u64).to_le_bytes());
        out.extend(F32.to_le_bytes());
        out.extend((data.len() as u64).to_le_bytes());
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
    out.resize(out.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
    out.extend(data);
    out
}

impl Gguf {
    /// Whether a file's first bytes say that it is GGUF.
    pub fn is_gguf(bytes: &[u8]) -> bool {
        bytes.starts_with(b"GGUF")
    }

    /// Parses a whole file's header.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if !Self::is_gguf(bytes) {
            return Err(Error::new("not a GGUF file")
                .expected("the bytes `GGUF` at its start")
                .got(format!("`{}`", bytes[..bytes.len().min(4)].escape_ascii())));
        }
        let mut reader = Reader { bytes, at: 4, entries: 0 };
        let version = reader.u32("the version")?;
        if !(2..=3).contains(&version) {
            let big_endian = (2..=3).contains(&version.swap_bytes());
            return Err(Error::new("unsupported GGUF version")
                .expected("2 or 3, little endian")
                .got(if big_endian { "a big-endian file".into() } else { version.to_string() }));
        }
        // A record is at least a name's length, a number of dimensions, one dimension, a type and
        // an offset; a metadata entry at least a key's length, a type and one byte.
        let tensors = reader.u64("the tensor count")?;
        let entries = reader.u64("the metadata count")?;
        reader.check_count("tensor records", tensors, 8 + 4 + 8 + 4 + 8)?;
        reader.check_count("metadata entries", entries, 8 + 4 + 1)?;

        let mut gguf = Self { metadata: BTreeMap::new(), tensors: BTreeMap::new() };
        for index in 0..entries {
            let (key, value) = reader.entry().at(|| format!("metadata entry {index}"))?;
            if gguf.metadata.insert(key.clone(), value).is_some() {
                return Err(Error::new("a metadata key stands twice").at(key).hint(DAMAGED));
            }
        }
        let alignment = gguf.unsigned("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
        if !alignment.is_power_of_two() || alignment > 1 << 20 {
            return Err(Error::new("bad alignment of tensor data")
                .at("general.alignment")
                .expected("a power of two")
                .got(alignment));
        }
        let mut records = Vec::new();
        for index in 0..tensors {
            records.push(reader.record().at(|| format!("tensor record {index}"))?);
        }
        gguf.place(records, (reader.at as u64).next_multiple_of(alignment), alignment, bytes)?;
        Ok(gguf)
    }

    /// Turns records into byte ranges of the file, which must not overlap.
    fn place(
        &mut self,
        records: Vec<Record>,
        start: u64,
        alignment: u64,
        bytes: &[u8],
    ) -> Result<()> {
        let mut ranges = Vec::new();
        for record in records {
            let name = record.name.clone();
            let placed = record.place(start, alignment, bytes.len()).at(|| name.clone())?;
            ranges.push((placed.bytes.clone(), name.clone()));
            if self.tensors.insert(name.clone(), placed).is_some() {
                return Err(Error::new("a tensor's name stands twice").at(name).hint(DAMAGED));
            }
        }
        ranges.sort_by_key(|(range, _)| range.start);
        for pair in ranges.windows(2) {
            let ((first, one), (second, other)) = (&pair[0], &pair[1]);
            if first.end > second.start {
                return Err(Error::new("two tensors overlap in the file")
                    .at(format!("{one} and {other}"))
                    .hint(DAMAGED));
            }
        }
        Ok(())
    }

    /// All metadata keys, in order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// A text; absent: `None`; of another type: an error.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.value(key, "a text", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// An integer that is not negative.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>> {
        self.value(key, "an integer, not negative", Value::unsigned)
    }

    /// A number.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        self.value(key, "a number", Value::float)
    }

    /// A list of numbers.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.value(key, "a list of numbers", |value| {
            value.array()?.iter().map(Value::float).collect()
        })
    }

    /// True or false.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.value(key, "true or false", |value| match value {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    }

    /// A list of texts.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.value(key, "a list of texts", |value| {
            value
                .array()?
                .iter()
                .map(|v| if let Value::Text(t) = v { Some(&**t) } else { None })
                .collect()
        })
    }

    /// A list of integers, none negative.
    pub fn unsigneds(&self, key: &str) -> Result<Option<Vec<u64>>> {
        self.value(key, "a list of integers, none negative", |value| {
            value.array()?.iter().map(Value::unsigned).collect()
        })
    }

    /// A list of truth values.
    pub fn booleans(&self, key: &str) -> Result<Option<Vec<bool>>> {
        self.value(key, "a list of truth values", |value| {
            let flags = value.array()?.iter();
            flags
                .map(|flag| if let Value::Bool(flag) = flag { Some(*flag) } else { None })
                .collect()
        })
    }

    /// The numbers of a tensor of this length in the file that `bytes` are; `None` where there is none.
    pub fn numbers(&self, bytes: &[u8], name: &str, count: usize) -> Result<Option<Vec<f32>>> {
        let Some(record) = self.tensors.get(name) else { return Ok(None) };
        if record.shape != [count] {
            return Err(Error::new("wrong tensor shape")
                .at(name)
                .expected(format!("[{count}]"))
                .got(format!("{:?}", record.shape)));
        }
        let mut numbers = vec![0.0; count];
        record.format.dequantise(&bytes[record.bytes.clone()], &mut numbers);
        Ok(Some(numbers))
    }

    fn value<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| {
            Error::new("metadata of the wrong type").at(key).expected(expected).got(value.kind())
        })
    }
}

impl Value {
    fn unsigned(&self) -> Option<u64> {
        match self {
            Self::Unsigned(n) => Some(*n),
            Self::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    fn float(&self) -> Option<f64> {
        match self {
            Self::Float(x) => Some(*x),
            Self::Unsigned(n) => Some(*n as f64),
            Self::Signed(n) => Some(*n as f64),
            _ => None,
        }
    }

    fn array(&self) -> Option<&[Self]> {
        if let Self::Array(values) = self { Some(values) } else { None }
    }

    /// Its type, or itself where it is short, for messages.
    fn kind(&self) -> String {
        match self {
            Self::Unsigned(n) => n.to_string(),
            Self::Signed(n) => n.to_string(),
            Self::Float(x) => x.to_string(),
            Self::Bool(b) => b.to_string(),
            Self::Text(_) => "a text".into(),
            Self::Array(values) => format!("a list of {}", values.len()),
        }
    }
}

/// A tensor record as it stands in the file.
struct Record {
    name: String,
    /// Row length first.
    dimensions: Vec<u64>,
    kind: u32,
    offset: u64,
}

impl Record {
    fn place(self, start: u64, alignment: u64, file_len: usize) -> Result<TensorRecord> {
        let format = format_of(self.kind)?;
        let mut shape = Vec::new();
        for &n in self.dimensions.iter().rev() {
            let n = usize::try_from(n).ok().filter(|n| *n > 0);
            shape.push(n.ok_or_else(|| self.bad_shape(format))?);
        }
        let (&cols, rows) = shape.split_last().ok_or_else(|| self.bad_shape(format))?;
        let rows = rows.iter().try_fold(1usize, |product, n| product.checked_mul(*n));
        let size = rows.and_then(|rows| format.bytes(rows, cols));
        let size = size.ok_or_else(|| self.bad_shape(format))?;
        if !self.offset.is_multiple_of(alignment) {
            return Err(Error::new("a tensor's offset is not aligned")
                .expected(format!("a multiple of {alignment}"))
                .got(self.offset)
                .hint(DAMAGED));
        }
        let first = start.checked_add(self.offset).and_then(|first| usize::try_from(first).ok());
        let end = first.and_then(|first| first.checked_add(size));
        match (first, end) {
            (Some(first), Some(end)) if end <= file_len => {
                Ok(TensorRecord { shape, format, bytes: first..end })
            }
            _ => Err(Error::new("a tensor's data ends beyond the file")
                .expected(format!(
                    "{size} bytes from offset {} of the data, which starts at byte {start}",
                    self.offset
                ))
                .got(format!("a file of {file_len} bytes"))
                .hint(DAMAGED)),
        }
    }

    fn bad_shape(&self, format: Format) -> Error {
        Error::new("a tensor's shape cannot be")
            .expected(format!(
                "dimensions above 0, rows of whole {}-value blocks, a size below 2^64 bytes",
                format.block_values()
            ))
            .got(format!("{:?} of type {}", self.dimensions, format.name()))
    }
}

fn format_of(kind: u32) -> Result<Format> {
    let name = TYPE_NAMES.get(kind as usize).copied();
    name.and_then(Format::named).ok_or_else(|| {
        Error::new("unsupported tensor type")
            .expected(format!("one of {}", Format::ALL.map(Format::name).join(", ")))
            .got(name.map_or_else(|| format!("type {kind}"), str::to_owned))
            .hint("take another quantisation of this model, for example Q8_0 or F16")
    })
}

/// Reads the header from its start to its end, never past the file's.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Array entries read so far.
    entries: u64,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: u64, what: &str) -> Result<&'a [u8]> {
        let left = &self.bytes[self.at..];
        let taken = usize::try_from(n).ok().and_then(|n| left.get(..n));
        let taken = taken.ok_or_else(|| {
            Error::new(format!("the file ends inside {what}"))
                .expected(format!("{n} bytes from byte {}", self.at))
                .got(format!("{} bytes", left.len()))
                .hint(DAMAGED)
        })?;
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn text(&mut self, what: &str) -> Result<String> {
        let length = self.u64(what)?;
        let bytes = self.take(length, what)?;
        String::from_utf8(bytes.to_vec())
            .map_err(|_| Error::new(format!("{what} is not UTF-8")).hint(DAMAGED))
    }

    /// Refuses a count of things of at least `least` bytes each that cannot be in the file.
    fn check_count(&self, what: &str, count: u64, least: u64) -> Result<()> {
        let most = (self.bytes.len() - self.at) as u64 / least;
        if count > most {
            return Err(Error::new(format!("the file is too short for its {what}"))
                .expected(format!("at most {most}"))
                .got(count)
                .hint(DAMAGED));
        }
        Ok(())
    }

    fn entry(&mut self) -> Result<(String, Value)> {
        let key = self.text("a metadata key")?;
        let kind = self.u32("a metadata type").at(|| key.clone())?;
        let value = self.value(kind, false).at(|| key.clone())?;
        Ok((key, value))
    }

    fn value(&mut self, kind: u32, in_array: bool) -> Result<Value> {
        let what = "a metadata value";
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>(what)?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(what)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(what)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(what)?).into()),
            4 => Value::Unsigned(self.u32(what)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(what)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(what)?).into()),
            7 => match self.array::<1>(what)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                n => return Err(Error::new("bad truth value").expected("0 or 1").got(n)),
            },
            8 => Value::Text(self.text(what)?),
            9 if !in_array => self.list()?,
            10 => Value::Unsigned(self.u64(what)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(what)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(what)?)),
            _ => {
                return Err(Error::new("unknown metadata type")
                    .expected("0..=12, and no list of lists")
                    .got(kind)
                    .hint(DAMAGED));
            }
        })
    }

    fn list(&mut self) -> Result<Value> {
        let kind = self.u32("a list's type")?;
        let count = self.u64("a list's length")?;
        self.check_count("list", count, 1)?;
        self.entries += count;
        if self.entries > MAX_ENTRIES {
            return Err(Error::new("metadata lists are too long")
                .expected(format!("at most {MAX_ENTRIES} entries in all"))
                .got(self.entries)
                .hint(DAMAGED));
        }
        Ok(Value::Array((0..count).map(|_| self.value(kind, true)).collect::<Result<_>>()?))
    }

    fn record(&mut self) -> Result<Record> {
        let name = self.text("a tensor's name")?;
        let count = self.u32("a tensor's dimensions").at(|| name.clone())?;
        if !(1..=MAX_DIMENSIONS).contains(&count) {
            return Err(Error::new("bad number of dimensions")
                .at(name)
                .expected(format!("1..={MAX_DIMENSIONS}"))
                .got(count)
                .hint(DAMAGED));
        }
        let dimensions =
            (0..count).map(|_| self.u64("a tensor's dimensions")).collect::<Result<_>>()?;
        let kind = self.u32("a tensor's type")?;
        let offset = self.u64("a tensor's offset")?;
        Ok(Record { name, dimensions, kind, offset })
    }
}
