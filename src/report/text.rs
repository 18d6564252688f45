//! The report in a terminal.

use super::{
    format::{
        axes, cells, condition, count, decimal, decimals, number, percent, points, pushed, rate,
        scope, signed, thousands, unit,
    },
    headline::Headline,
    index::Index,
    tables::{
        BiasTable, IntentTable, OutcomeTable, ProbePoint, ProbeTable, ReadTable, ReplyTable, Scope,
        Tables, TextTable,
    },
};
use crate::experiment::stats::Interval;

const WIDTH: usize = 96;

pub(super) fn build(index: &Index, tables: &Tables, headline: &Headline) -> String {
    let model = &index.manifest.model;
    let numerics = &index.manifest.numerics;
    let progress = tables.progress;
    let mut out = format!(
        "{} · {} parameters · {} {} · {} of {} trials\n\n",
        model.name,
        thousands(model.parameters),
        numerics.device,
        numerics.dtype,
        thousands(progress.done),
        thousands(progress.planned)
    );
    out += &wrap(&headline.to_string());
    let mut section = |name, texts: String| {
        if index.shows(name) {
            out += &texts;
        }
    };
    section("readout", tables.reads.iter().map(read).collect());
    section("bias", tables.biases.iter().map(bias).collect());
    section("replies", tables.replies.iter().map(replies).collect());
    section("outcomes", tables.outcomes.iter().map(outcomes).collect());
    section("texts", tables.texts.iter().map(texts).collect());
    section("intents", tables.intents.iter().map(intents).collect());
    section("probes", tables.probes.iter().map(probes).collect());
    let flagged: usize = tables.receipts.iter().map(|row| row.flagged.len()).sum();
    if flagged > 0 {
        out += &format!("\nReceipts: {flagged} trials were not changed as planned.\n");
    }
    // Names come from files: no control character of theirs reaches the terminal.
    out.chars().filter(|c| *c == '\n' || !c.is_control()).collect()
}

fn read(table: &ReadTable) -> String {
    let (doses, depths) = axes(table.cells.iter().map(|row| row.cell));
    let mut rows = vec![vec!["depth".to_owned()]];
    rows[0].extend(doses.iter().map(|dose| format!("dose {dose}")));
    for depth in depths {
        let mut row = vec![super::format::depth(&depth)];
        for dose in &doses {
            let cell = table.cells.iter().find(|row| {
                (row.cell.layer, row.cell.depth, row.cell.dose) == (depth.layer, depth.depth, *dose)
            });
            let share = |rate: Option<crate::experiment::stats::Rate>| {
                rate.map_or("–".into(), |rate| percent(rate.share))
            };
            row.push(cell.map_or(String::new(), |row| {
                format!("{} | {}", share(row.concept), share(row.random))
            }));
        }
        rows.push(row);
    }
    format!(
        "\nConcept read first of {} words, concept | random vectors (dose {}) [{} / {}]\n{}",
        table.words,
        unit(table.mode),
        table.part,
        table.prompt,
        align(&rows)
    )
}

fn bias(table: &BiasTable) -> String {
    let head = ["condition", "cells", "yes, asked", "yes, unrelated", "shift", "net shift"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for row in table.rows.iter().filter(|row| !matches!(row.scope, Scope::Cell(_))) {
        let interval = row.interval.map_or(String::new(), decimals);
        rows.push(vec![
            condition(row.condition).into(),
            cells(row.condition, &row.scope),
            rate(&row.asked.yes),
            rate(&row.unrelated.yes),
            format!("{} | {}", decimal(row.asked.shift, 2), decimal(row.unrelated.shift, 2)),
            format!("{} {interval}", decimal(row.net_shift, 2)),
        ]);
    }
    format!(
        "\nIs yes just pushed up? Questions about thoughts against unrelated ones whose answer is no \
         (dose {}) [{}]\nclean: {} right, yes to {} asked and {} unrelated\n{}",
        unit(table.mode),
        table.part,
        count(table.right),
        count(table.clean.0),
        count(table.clean.1),
        align(&rows)
    ) + &pushed(table).map_or(String::new(), |sentence| wrap(&sentence))
}

fn replies(table: &ReplyTable) -> String {
    let head = ["condition", "cells", "n", "coherent", "claims", "mentions", "identified"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for arm in table.arms.iter().filter(|arm| !matches!(arm.scope, Scope::Cell(_))) {
        rows.push(vec![
            condition(arm.condition).into(),
            cells(arm.condition, &arm.scope),
            arm.claims.count.n.to_string(),
            percent(arm.coherent.share),
            rate(&arm.claims),
            rate(&arm.mentions),
            rate(&arm.identified),
        ]);
    }
    let mut nets = vec![
        ["cells", "H − F random", "p", "H − F clean", "I − F", "d′"].map(str::to_owned).to_vec(),
    ];
    for row in table.contrasts.iter().filter(|row| !matches!(row.scope, Scope::Cell(_))) {
        let net = |net: Option<crate::experiment::stats::Difference>| {
            net.map_or("–".into(), |net| {
                format!("{} {}", signed(net.value), points(net.interval))
            })
        };
        nets.push(vec![
            scope(&row.scope),
            net(row.net_random),
            number(row.p),
            net(row.net_clean),
            net(row.net_identified),
            row.detection.map_or("–".into(), |d| {
                format!("{} {}", decimal(d.d_prime, 2), decimals(d.interval))
            }),
        ]);
    }
    format!(
        "\nReplies (dose {}) [{} / {}]; the injected words stand in clean replies {} times\n{}\n\
         Hits against false alarms, percentage points\n{}",
        unit(table.mode),
        table.part,
        table.prompt,
        count(table.chance),
        align(&rows),
        align(&nets)
    )
}

fn outcomes(table: &OutcomeTable) -> String {
    let mut rows =
        vec![["condition", "cells", "success", "less random"].map(str::to_owned).to_vec()];
    for row in table.rows.iter().filter(|row| !matches!(row.scope, Scope::Cell(_))) {
        let net = row
            .net
            .map_or("–".into(), |net| format!("{} {}", signed(net.value), points(net.interval)));
        let cells = cells(row.condition, &row.scope);
        rows.push(vec![condition(row.condition).into(), cells, rate(&row.success), net]);
    }
    format!(
        "\nSuccesses (dose {}) [{} / {}]\n{}",
        unit(table.mode),
        table.part,
        table.prompt,
        align(&rows)
    )
}

fn texts(table: &TextTable) -> String {
    let head = ["condition", "cells", "thinks", "repeats", "both", "less random"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for row in table.rows.iter().filter(|row| !matches!(row.scope, Scope::Cell(_))) {
        let net = row
            .net
            .map_or("–".into(), |net| format!("{} {}", signed(net.value), points(net.interval)));
        let rates = [&row.thinks, &row.repeats, &row.both].map(rate);
        let mut line = vec![condition(row.condition).into(), cells(row.condition, &row.scope)];
        line.extend(rates);
        line.push(net);
        rows.push(line);
    }
    format!("\nThought against text (dose {}) [{}]\n{}", unit(table.mode), table.part, align(&rows))
}

fn intents(table: &IntentTable) -> String {
    let head = ["condition", "cells", "apologises", "meant it", "accident", "repeats"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for row in table.rows.iter().filter(|row| !matches!(row.scope, Scope::Cell(_))) {
        let mut line = vec![condition(row.condition).into(), cells(row.condition, &row.scope)];
        line.extend([&row.apologises, &row.intends, &row.disowns].map(rate));
        line.push(row.guard.map_or("–".into(), count));
        rows.push(line);
    }
    format!(
        "\nIs a word that was put in its mouth owned? (dose {}) [{} / {}]\n{}",
        unit(table.mode),
        table.part,
        table.prompt,
        align(&rows)
    )
}

fn probes(table: &ProbeTable) -> String {
    let fine = |interval: Interval| {
        format!("[{}, {}]", decimal(interval.low, 4), decimal(interval.high, 4))
    };
    let shown = |point: &ProbePoint| {
        format!("{} {}", decimal(point.mean, 4), point.interval.map_or(String::new(), fine))
    };
    let mut rows = vec![["difference", "mean over all layers"].map(str::to_owned).to_vec()];
    for of in &table.contrasts {
        rows.push(vec![format!("{} − {}", of.first, of.second), shown(&of.overall)]);
    }
    format!("\nCosine with the word's vector while writing [{}]\n{}", table.part, align(&rows))
}

/// Columns padded to their widest cell, the first row underlined.
pub(super) fn align(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell: &String| cell.chars().count())
            .max()
    };
    let widths: Vec<_> = (0..columns).filter_map(width).collect();
    let mut out = String::new();
    for (at, row) in rows.iter().enumerate() {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        out += cells.collect::<Vec<_>>().join("  ").trim_end();
        out.push('\n');
        if at == 0 {
            out += &widths.iter().map(|width| "─".repeat(*width)).collect::<Vec<_>>().join("  ");
            out.push('\n');
        }
    }
    out
}

fn wrap(text: &str) -> String {
    let mut out = String::new();
    let mut column = 0;
    for word in text.split(' ') {
        let width = word.chars().count();
        if column > 0 && column + 1 + width > WIDTH {
            out.push('\n');
            column = 0;
        } else if column > 0 {
            out.push(' ');
            column += 1;
        }
        out += word;
        column += width;
    }
    out.push('\n');
    out
}
