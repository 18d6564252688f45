//! Every table and figure as CSV: one file for each list of rows, one column for each number.

use serde::Serialize;
use serde_json::Value;

use super::tables::{ProbeTable, Tables};

/// File name and content of each table that has rows.
pub(super) fn files(tables: &Tables) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut add = |name: &[&str], rows: Vec<Value>| {
        if !rows.is_empty() {
            files.push((file_name(name), text(&rows)));
        }
    };
    add(&["receipts"], values(&tables.receipts));
    for table in &tables.reads {
        add(&["readout", &table.part, &table.prompt], values(&table.cells));
    }
    for table in &tables.biases {
        add(&["bias", &table.part], values(&table.rows));
    }
    for table in &tables.replies {
        add(&["replies", &table.part, &table.prompt], values(&table.arms));
        add(&["detection", &table.part, &table.prompt], values(&table.contrasts));
    }
    for table in &tables.outcomes {
        add(&["outcomes", &table.part, &table.prompt], values(&table.rows));
    }
    for table in &tables.texts {
        add(&["texts", &table.part], values(&table.rows));
    }
    for table in &tables.intents {
        add(&["intents", &table.part, &table.prompt], values(&table.rows));
    }
    for table in &tables.probes {
        add(&["probes", &table.part], curves(table));
        add(&["probes", &table.part, "differences"], differences(table));
    }
    files
}

/// Letters, digits, dots and dashes.
fn file_name(parts: &[&str]) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
    parts.join("-").chars().map(plain).collect::<String>() + ".csv"
}

fn values(rows: &[impl Serialize]) -> Vec<Value> {
    rows.iter().filter_map(|row| serde_json::to_value(row).ok()).collect()
}

/// One row a prompt and layer.
fn curves(table: &ProbeTable) -> Vec<Value> {
    let rows = table.curves.iter().flat_map(|curve| {
        table.layers.iter().enumerate().map(|(at, layer)| {
            let mut row = serde_json::json!({
                "prompt": curve.prompt,
                "layer": layer,
                "trials": curve.trials,
                "above": curve.above[at],
                "cosine": curve.points[at],
                "band": curve.bands[at],
            });
            for (bin, value) in curve.map[at].iter().enumerate() {
                row[format!("part{}", bin + 1)] = (*value).into();
            }
            row
        })
    });
    rows.collect()
}

fn differences(table: &ProbeTable) -> Vec<Value> {
    let rows = table.contrasts.iter().flat_map(|of| {
        let row = |(layer, point): (&usize, &super::ProbePoint)| {
            serde_json::json!({
                "first": of.first, "second": of.second, "layer": layer, "cosine": point,
            })
        };
        table.layers.iter().zip(&of.points).map(row)
    });
    rows.collect()
}

/// Objects as rows: nested fields are columns with dots, lists are joined by semicolons, what a row lacks
/// is empty. Columns stand in the order in which they first occur.
fn text(rows: &[Value]) -> String {
    let flat: Vec<Vec<(String, String)>> = rows
        .iter()
        .map(|row| {
            let mut cells = Vec::new();
            flatten(String::new(), row, &mut cells);
            cells
        })
        .collect();
    let mut head: Vec<&str> = Vec::new();
    for (name, _) in flat.iter().flatten() {
        if !head.contains(&name.as_str()) {
            head.push(name);
        }
    }
    let mut writer = csv::Writer::from_writer(Vec::new());
    let cell = |row: &Vec<(String, String)>, name: &str| {
        row.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value).to_owned()
    };
    // Writing to memory fails only for rows of different lengths.
    writer.write_record(&head).expect("a head");
    for row in &flat {
        let cells: Vec<String> = head.iter().map(|name| cell(row, name)).collect();
        writer.write_record(&cells).expect("a row as long as the head");
    }
    String::from_utf8_lossy(&writer.into_inner().unwrap_or_default()).into_owned()
}

fn flatten(name: String, value: &Value, cells: &mut Vec<(String, String)>) {
    let plain = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    match value {
        Value::Null => {}
        Value::Object(fields) => {
            for (key, value) in fields {
                let dot = if name.is_empty() { "" } else { "." };
                flatten(format!("{name}{dot}{key}"), value, cells);
            }
        }
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(plain).collect();
            cells.push((name, items.join(";")));
        }
        other => cells.push((name, plain(other))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nested_fields_are_columns_and_gaps_are_empty() {
        let rows = [
            json!({"a": 1, "b": {"c": 2.5, "d": null}, "e": ["x", 3]}),
            json!({"a": "p, q", "b": {"c": 1, "d": true}}),
        ];
        assert_eq!(text(&rows), "a,b.c,e,b.d\n1,2.5,x;3,\n\"p, q\",1,,true\n");
        assert_eq!(file_name(&["replies", "a/b", "c d"]), "replies-a-b-c-d.csv");
    }
}
