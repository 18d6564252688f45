//! Numbers as they are printed everywhere.

use super::tables::{BiasRow, BiasTable, Cell, Scope};
use crate::{
    experiment::{
        results::Condition,
        stats::{Count, Interval, Rate},
    },
    request::StrengthMode,
};

/// A share in percent: `0%`, `3.7%`, `42%`.
pub(super) fn percent(share: f64) -> String {
    let value = 100.0 * share;
    if value == 0.0 || value.abs() >= 9.95 {
        format!("{value:.0}%")
    } else {
        format!("{value:.1}%")
    }
}

/// An interval of a share: `[11%, 33%]`.
pub(super) fn percents(interval: Interval) -> String {
    format!("[{}, {}]", percent(interval.low), percent(interval.high))
}

/// A difference of shares in percentage points, with its sign: `+4.2`, `−13.0`.
pub(super) fn signed(difference: f64) -> String {
    let value = 100.0 * difference;
    let sign = if value.abs() < 0.05 {
        ""
    } else if value < 0.0 {
        "−"
    } else {
        "+"
    };
    format!("{sign}{:.1}", value.abs())
}

/// An interval of a difference.
pub(super) fn points(interval: Interval) -> String {
    format!("[{}, {}]", signed(interval.low), signed(interval.high))
}

/// `20% [11%, 33%]`.
pub(super) fn rate(rate: &Rate) -> String {
    format!("{} {}", percent(rate.share), percents(rate.interval))
}

/// `10/50`.
pub(super) fn count(count: Count) -> String {
    format!("{}/{}", count.k, count.n)
}

/// What a dose is in.
pub(super) fn unit(mode: Option<StrengthMode>) -> &'static str {
    match mode {
        Some(StrengthMode::Raw) => "× the vector",
        Some(StrengthMode::Unit) => "in the stream's own units",
        Some(StrengthMode::Reference) => "× the stream's mean norm",
        Some(StrengthMode::Row) => "× each row's norm",
        None => "",
    }
}

/// `0.80 · L24`.
pub(super) fn depth(cell: &Cell) -> String {
    format!("{:.2} · L{}", cell.depth, cell.layer)
}

/// Which cells a row is about.
pub(super) fn scope(scope: &Scope) -> String {
    match scope {
        Scope::All => "all cells".into(),
        Scope::Dose(dose) => format!("dose {dose}"),
        Scope::Cell(cell) => format!("depth {}, dose {}", depth(cell), cell.dose),
    }
}

/// The cells of an arm: clean replies belong to none.
pub(super) fn cells(of: Condition, cells: &Scope) -> String {
    if of == Condition::Clean { "–".into() } else { scope(cells) }
}

/// The condition's name.
pub(super) fn condition(condition: Condition) -> &'static str {
    match condition {
        Condition::Clean => "clean",
        Condition::Concept => "concept",
        Condition::Random => "random",
        Condition::Negated => "negated",
        Condition::Shuffled => "shuffled",
        Condition::Other => "other",
        Condition::After => "after",
    }
}

/// What the concept vectors of all cells do to yes, in a sentence.
pub(super) fn pushed(table: &BiasTable) -> Option<String> {
    let of_all = |row: &&BiasRow| (row.condition, row.scope) == (Condition::Concept, Scope::All);
    let row = table.rows.iter().find(of_all)?;
    let interval = row.interval?;
    let more = if interval.low > 0.0 {
        "more than whatever else is asked"
    } else {
        "no more than whatever else is asked, so that a yes is no sign of noticing"
    };
    Some(format!(
        "Over all cells concept vectors shift the answer towards yes by {} nats where thoughts are asked \
         about and by {} where not (net {} {}): {more}.",
        decimal(row.asked.shift, 2),
        decimal(row.unrelated.shift, 2),
        decimal(row.net_shift, 2),
        decimals(interval)
    ))
}

/// A number with three significant digits; `–` where there is none.
pub(super) fn number(value: Option<f64>) -> String {
    let Some(value) = value else { return "–".into() };
    let digits = match value.abs() {
        0.0 => 0,
        x if x < 0.001 => return format!("{value:.1e}"),
        x => (2 - x.log10().floor() as i32).clamp(0, 5) as usize,
    };
    format!("{value:.digits$}")
}

/// A number with so many decimals and a real minus sign.
pub(super) fn decimal(value: f64, digits: usize) -> String {
    format!("{value:.digits$}").replace('-', "−")
}

/// A d′ or an AUROC's interval.
pub(super) fn decimals(interval: Interval) -> String {
    format!("[{}, {}]", decimal(interval.low, 2), decimal(interval.high, 2))
}

/// `1 word`, `8 words`.
pub(super) fn plural(n: usize, noun: &str) -> String {
    format!("{} {noun}{}", thousands(n as u64), if n == 1 { "" } else { "s" })
}

/// A whole number with thin spaces between thousands.
pub(super) fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// The distinct doses and (layer, depth)s of cells: a grid's columns and rows.
pub(super) fn axes(cells: impl Iterator<Item = Cell>) -> (Vec<f64>, Vec<Cell>) {
    let mut cells: Vec<_> = cells.collect();
    cells.sort_by(Cell::order);
    let mut doses: Vec<_> = cells.iter().map(|cell| cell.dose).collect();
    doses.sort_by(f64::total_cmp);
    doses.dedup();
    cells.dedup_by_key(|cell| (cell.layer, cell.depth.to_bits()));
    (doses, cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            [0.0, 0.037, 0.0999, 0.42, 1.0].map(percent),
            ["0%", "3.7%", "10%", "42%", "100%"]
        );
        assert_eq!([0.042, -0.13, 0.0001].map(signed), ["+4.2", "−13.0", "0.0"]);
        let values = [Some(0.0), Some(25_137.0), Some(1.234), Some(0.0312), Some(2e-9), None];
        assert_eq!(values.map(number), ["0", "25137", "1.23", "0.0312", "2.0e-9", "–"]);
        assert_eq!(thousands(134_515_008), "134\u{202f}515\u{202f}008");
    }
}
