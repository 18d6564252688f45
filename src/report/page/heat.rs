//! Depth by dose, as a table with coloured cells that also say their numbers.

use crate::report::{
    format::{axes, depth},
    html::{Table, stacked},
    tables::Cell,
};

/// One field of a heat map.
pub(super) struct Field {
    /// The colour's strength, −1..1; below 0 in another hue.
    pub value: f64,
    /// The number.
    pub text: String,
    /// A smaller line below it.
    pub note: String,
    /// `grey` (not to be trusted), `chosen`, or nothing.
    pub class: &'static str,
}

/// The map of the cells that have a field; nothing where none has.
pub(super) fn map(caption: &str, cells: &[(Cell, Option<Field>)]) -> String {
    if cells.iter().all(|(_, field)| field.is_none()) {
        return String::new();
    }
    let (doses, depths) = axes(cells.iter().map(|(cell, _)| *cell));
    let head: Vec<_> = std::iter::once("depth ↓ dose →".to_owned())
        .chain(doses.iter().map(f64::to_string))
        .collect();
    let head: Vec<_> = head.iter().map(String::as_str).collect();
    let mut table = Table::new(caption, &head);
    for row in &depths {
        let fields = doses.iter().map(|dose| {
            let wanted = Cell { dose: *dose, ..*row };
            let found = cells.iter().find(|(cell, _)| *cell == wanted);
            draw(found.and_then(|(_, field)| field.as_ref()))
        });
        table.row_with(&depth(row), &fields.collect::<Vec<_>>());
    }
    format!("<div class=\"heat\">{}</div>\n", table.html())
}

/// A field's attributes and content.
fn draw(field: Option<&Field>) -> (String, String) {
    let Some(field) = field else { return ("class=\"grey\"".into(), "–".into()) };
    let below = if field.value < 0.0 { "below " } else { "" };
    let at = field.value.abs().min(1.0);
    (
        format!("class=\"{below}{}\" style=\"--at:{at:.2}\"", field.class),
        stacked(&field.text, &field.note),
    )
}
