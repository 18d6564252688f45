//! `NumPy`'s `.npy`: one array of little-endian numbers in C order; read are (dim,) and (layers, dim) of f2, f4
//! or f8.

use crate::error::{Error, Result};

const MAGIC: &[u8] = b"\x93NUMPY";

/// Whether a file begins as one.
pub(super) fn is_npy(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// Shape and values.
pub(super) fn parse(bytes: &[u8]) -> Result<(Vec<usize>, Vec<f32>)> {
    let broken = |what: &str| Error::new("not an .npy file that can be read").got(what.to_owned());
    let version = *bytes.get(6).ok_or_else(|| broken("an end in its header"))?;
    let (start, length): (usize, Option<usize>) = match version {
        1 => (10, bytes.get(8..10).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])))),
        2 | 3 => {
            let length = bytes.get(8..12);
            (12, length.map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize))
        }
        other => return Err(broken(&format!("version {other}"))),
    };
    let end = length.and_then(|length| start.checked_add(length));
    let header = end.and_then(|end| bytes.get(start..end));
    let header = header.and_then(|header| std::str::from_utf8(header).ok());
    let header = header.ok_or_else(|| broken("an end in its header"))?;
    let after = |key: &str| Some(header.split_once(&format!("'{key}':"))?.1.trim_start());
    let order = after("fortran_order").ok_or_else(|| broken("no fortran_order"))?;
    let shape = after("shape").and_then(|rest| rest.strip_prefix('(')?.split_once(')'));
    let shape = shape.ok_or_else(|| broken("no shape"))?.0;
    let shape: Option<Vec<usize>> = shape
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(|part| part.parse().ok())
        .collect();
    let shape = shape.ok_or_else(|| broken("a shape that is no list of numbers"))?;
    if order.starts_with("True") && shape.len() > 1 {
        return Err(broken("Fortran order").hint("save numpy.ascontiguousarray(a)"));
    }
    let kind = after("descr").and_then(|rest| rest.strip_prefix('\'')?.split_once('\''));
    let kind = kind.ok_or_else(|| broken("no descr"))?.0;
    let data = &bytes[start + header.len()..];
    let values: Vec<f32> = match kind {
        "<f4" => data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        "<f8" => data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
        "<f2" => data.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        other => return Err(broken(other).expected("'<f4', '<f8' or '<f2'")),
    };
    let size = shape.iter().try_fold(1_usize, |size, n| size.checked_mul(*n));
    if size != Some(values.len()) {
        return Err(Error::new("the file's values are not as many as its shape says")
            .expected(format!("{shape:?}"))
            .got(values.len()));
    }
    Ok((shape, values))
}

/// The first bytes of an `.npy` file (format 1.0): a multiple of 64.
pub fn header(descr: &str, shape: &[usize]) -> Vec<u8> {
    let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
    let comma = if sizes.len() == 1 { "," } else { "" };
    let mut text = format!(
        "{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}{comma}), }}",
        sizes.join(", ")
    );
    text.push_str(&" ".repeat((text.len() + 11).next_multiple_of(64) - text.len() - 11));
    text.push('\n');
    let mut bytes = [MAGIC, &[1, 0]].concat();
    bytes.extend((text.len() as u16).to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([1, 0]);
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn values(numbers: &[f32]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    #[test]
    fn arrays_are_read_and_mistakes_named() {
        let head = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }          \n";
        let data = values(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let (shape, read) = parse(&file(head, &data)).unwrap();
        assert_eq!((shape, read), (vec![2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        let flat = head.replace("(2, 3)", "(6,)").replace("False", "True");
        assert_eq!(parse(&file(&flat, &data)).unwrap().0, [6], "one dimension has one order");
        let double: Vec<u8> = [0.5_f64, -2.0].iter().flat_map(|n| n.to_le_bytes()).collect();
        let head8 = head.replace("<f4", "<f8").replace("(2, 3)", "(2,)");
        assert_eq!(parse(&file(&head8, &double)).unwrap().1, [0.5, -2.0]);
        for (from, to, want) in [
            ("False", "True", "Fortran"),
            ("<f4", ">f4", ">f4"),
            ("<f4", "<i4", "<i4"),
            ("(2, 3)", "(2, 4)", "expected: [2, 4]"),
            ("(2, 3)", "(2, x)", "shape"),
            ("'shape'", "'form'", "shape"),
        ] {
            let error = parse(&file(&head.replace(from, to), &data)).unwrap_err().to_string();
            assert!(error.contains(want), "{to}: {error}");
        }
        for cut in [6, 9, 12, 30] {
            assert!(parse(&file(head, &data)[..cut]).is_err(), "{cut} bytes");
        }
    }
}
