//! Every table and figure as CSV: one file for each list of rows, one column for each number.

use serde::Serialize;
use serde_json::Value;

use super::tables::{ProbeTable, Tables};

/// File name and content of each table that has rows.
pub(super) fn files(tables: &Tables) -> Vec<(String, String)> {
    let mut files: Vec<(String, String)> = Vec::new();
    let mut add = |name: &[&str], rows: Vec<Value>| {
        if !rows.is_empty() {
            // Names that differ in other signs only are told apart by a number.
            let plain = file_name(name);
            let taken = |name: &str| files.iter().any(|(known, _)| known == name);
            let numbered = (2..).map(|n| plain.replace(".csv", &format!("-{n}.csv")));
            let free = std::iter::once(plain.clone()).chain(numbered).find(|name| !taken(name));
            files.push((free.unwrap_or(plain), text(&rows)));
        }
    };
    add(&["summary"], summary(tables));
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

/// What is one number or cell of a table, a row each.
fn summary(tables: &Tables) -> Vec<Value> {
    let row = |table: String, what: &str, value: Value| serde_json::json!({"table": table, "what": what, "value": value});
    let mut rows = vec![row("run".into(), "progress", json(&tables.progress))];
    for table in &tables.reads {
        let name = format!("readout {}/{}", table.part, table.prompt);
        rows.push(row(
            name,
            "sensitivity at one false alarm in a hundred",
            json(&table.sensitivity),
        ));
    }
    for table in &tables.biases {
        rows.push(row(format!("bias {}", table.part), "clean right", json(&table.right)));
        rows.push(row(format!("bias {}", table.part), "clean yes, asked", json(&table.clean.0)));
        rows.push(row(
            format!("bias {}", table.part),
            "clean yes, unrelated",
            json(&table.clean.1),
        ));
    }
    for table in &tables.replies {
        let name = format!("replies {}/{}", table.part, table.prompt);
        rows.push(row(name.clone(), "chance of a mention", json(&table.chance)));
        for (word, count) in &table.chance_words {
            rows.push(row(name.clone(), &format!("chance of {word}"), json(count)));
        }
    }
    for table in &tables.texts {
        rows.push(row(format!("texts {}", table.part), "chosen", json(&table.chosen)));
    }
    for table in &tables.intents {
        let name = format!("intents {}/{}", table.part, table.prompt);
        rows.push(row(name, "score", json(&table.score)));
    }
    for table in &tables.probes {
        for contrast in &table.contrasts {
            let what = format!("{} less {}, all layers", contrast.first, contrast.second);
            rows.push(row(format!("probes {}", table.part), &what, json(&contrast.overall)));
        }
    }
    rows
}

/// Letters, digits, dots and dashes.
fn file_name(parts: &[&str]) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
    parts.join("-").chars().map(plain).collect::<String>() + ".csv"
}

fn json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or_default()
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
