//! What can be read out of the logits.

use super::{
    Entry, Group, Index, MarginCell, ReadTable, ReadoutCell, clusters, concepts, mean, place,
};
use crate::experiment::{
    results::Condition,
    stats::{self, Interval, Ranking, quantile},
};

pub(super) fn table(group: &Group, index: &Index) -> ReadTable {
    let concepts = concepts(group);
    let words = group.entries.iter().find_map(|e| e.trial.read.as_ref()).map_or(0, |r| r.words);
    let cells: Vec<_> = group.cells();
    let arm = |cell, condition| {
        let of = |e: &&Entry| e.trial.condition == condition && e.cell() == Some(cell);
        group.entries.iter().filter(of).copied().collect::<Vec<_>>()
    };
    let rankings: Vec<_> = cells
        .iter()
        .map(|cell| {
            let mut values = Vec::new();
            for condition in [Condition::Concept, Condition::Random] {
                for Entry { trial, .. } in arm(*cell, condition) {
                    if let (Some(first), Some(at)) =
                        (&trial.first, place(&concepts, &trial.concept))
                    {
                        values.push((first.margin, at, condition == Condition::Concept));
                    }
                }
            }
            Ranking::new(values)
        })
        .collect();
    let all = group.entries.iter().filter_map(|e| {
        let is_concept = match e.trial.condition {
            Condition::Concept => true,
            Condition::Random => false,
            _ => return None,
        };
        Some((e.trial.first.as_ref()?.margin, 0, is_concept))
    });
    let sensitivity = Ranking::new(all.collect()).sensitivity(0.01);
    let seed = index.seed(&format!("margins {} {}", group.part, group.prompt));
    let intervals = stats::bootstrap(concepts.len(), cells.len(), seed, |weights| {
        rankings.iter().map(|ranking| ranking.auroc(weights)).collect()
    });
    let rows =
        cells.iter().zip(rankings.iter().zip(intervals)).map(|(cell, (ranking, interval))| {
            let [concept, random] = [Condition::Concept, Condition::Random].map(|c| arm(*cell, c));
            let first = |e: &Entry| Some(e.trial.read.as_ref()?.rank == 1);
            ReadoutCell {
                cell: *cell,
                concept: stats::rate(&clusters(&concepts, &concept, first)),
                random: stats::rate(&clusters(&concepts, &random, first)),
                margin: ranking
                    .auroc(&vec![1; concepts.len()])
                    .and_then(|auroc| margin(auroc, interval, &concept, &random)),
                kl: (kl(&concept), kl(&random)),
            }
        });
    ReadTable {
        part: group.part.into(),
        prompt: group.prompt.into(),
        mode: group.mode(),
        words,
        cells: rows.collect(),
        sensitivity,
    }
}

fn kl(arm: &[Entry]) -> Option<f64> {
    mean(arm.iter().filter_map(|e| e.trial.next.as_ref()?.kl))
}

fn margin(
    auroc: f64,
    interval: Option<Interval>,
    concept: &[Entry],
    random: &[Entry],
) -> Option<MarginCell> {
    let margins = |arm: &[Entry]| {
        let firsts = arm.iter().filter_map(|e| e.trial.first.as_ref());
        let mut values: Vec<_> = firsts.map(|first| first.margin).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let (own, other) = (margins(concept), margins(random));
    let firsts = concept.iter().chain(random).filter_map(|e| e.trial.first.as_ref());
    Some(MarginCell {
        auroc,
        interval,
        trials: (own.len(), other.len()),
        mass: mean(firsts.map(|first| first.mass))?,
        medians: (quantile(&own, 0.5)?, quantile(&other, 0.5)?),
    })
}
