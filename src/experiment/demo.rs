//! Time-boxing: measure a few trials, predict the rest, and cut what would not fit.
//!
//! Repeats go first, then doses, then layers; controls, prompts and words never. The cuts are stored
//! in the run's protocol, so that a resumed run takes them over and measures nothing.

use std::{ops::Range, time::Instant};

use serde::{Deserialize, Serialize};

use crate::{
    error::Result,
    experiment::{
        Jobs, Progress,
        grid::{Dimensions, Grid},
        plan::Plan,
        prepare::Prepared,
        protocol::{Kind, Protocol},
        results::Trial,
        runner,
    },
};

/// Sizes of the rounds in which a part is measured: a few trials, then as many as fill a batch,
/// since trials are many times cheaper together than alone.
const ROUNDS: [usize; 2] = [4, 64];
/// No further round after one that took this long.
const SLOW_SECONDS: f64 = 15.0;

/// What is left of a part after cutting.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cut {
    /// The part's name.
    pub part: String,
    /// The first repeats are run.
    pub repeats: u32,
    /// These doses are run.
    pub doses: Vec<f64>,
    /// These blocks are injected at.
    pub layers: Vec<usize>,
    /// What was cut and why, for the reader.
    pub text: String,
}

/// What a few trials cost.
#[derive(Clone, Debug)]
pub struct Measurement {
    /// Seconds a trial, for each part.
    pub seconds: Vec<f64>,
    /// The measured trials: those still in the plan after cutting are kept.
    pub trials: Vec<Trial>,
}

/// Runs a few trials of each part, evenly spread over its first repeat, which is never cut. A part
/// too small for a full round takes the rate of the slowest measured part of its kind.
pub fn measure(
    plan: &Plan,
    protocol: &Protocol,
    engine: &dyn Jobs,
    progress: &mut dyn Progress,
) -> Result<Measurement> {
    let parts = &protocol.parts;
    let mut measurement = Measurement { seconds: vec![0.0; parts.len()], trials: Vec::new() };
    let grid = plan.grid();
    let mut order: Vec<usize> = (0..parts.len()).collect();
    order.sort_by_key(|part| std::cmp::Reverse(grid.of_part(*part).len()));
    let is_reply = |part: usize| matches!(parts[part].kind, Kind::Sample(_));
    for (at, &part) in order.iter().enumerate() {
        let measured = order[..at].iter().filter(|other| is_reply(**other) == is_reply(part));
        let slowest = measured.map(|other| measurement.seconds[*other]).max_by(f64::total_cmp);
        if let Some(slowest) = slowest.filter(|_| grid.of_part(part).len() < ROUNDS[1]) {
            measurement.seconds[part] = slowest;
            continue;
        }
        let mut left = spread(grid.first_repeat(part), ROUNDS.iter().sum());
        for size in ROUNDS {
            let round = take_spread(&mut left, size);
            if round.is_empty() {
                break;
            }
            let clock = Instant::now();
            let before = measurement.trials.len() as u64;
            let mut save = |trial| {
                measurement.trials.push(trial);
                Ok(())
            };
            progress.advance("measuring", before, 0, 0);
            let wanted = |place| round.contains(&place);
            runner::execute(plan, &wanted, engine, &mut save, &mut |_, _| Ok(()), &mut ())?;
            let took = clock.elapsed().as_secs_f64();
            measurement.seconds[part] = took / round.len() as f64;
            if took >= SLOW_SECONDS {
                break;
            }
        }
    }
    Ok(measurement)
}

/// `count` evenly spaced entries of a range, or all.
fn spread(range: Range<usize>, count: usize) -> Vec<usize> {
    let count = count.min(range.len());
    let step = range.len() as f64 / count as f64;
    (0..count).map(|i| range.start + ((i as f64 + 0.5) * step) as usize).collect()
}

/// Takes `count` evenly spaced entries out of the list.
fn take_spread(left: &mut Vec<usize>, count: usize) -> Vec<usize> {
    let chosen: Vec<usize> = spread(0..left.len(), count).iter().map(|i| left[*i]).collect();
    left.retain(|index| !chosen.contains(index));
    chosen
}

/// The cuts that bring the protocol into `budget` seconds, given the seconds a trial of each part
/// takes: a pure function. None where everything fits. Where even the smallest grid does not fit,
/// the texts say so.
pub fn fit(protocol: &Protocol, prepared: &Prepared, seconds: &[f64], budget: f64) -> Vec<Cut> {
    let grids: Vec<Dimensions> = (0..protocol.parts.len())
        .map(|index| Dimensions::of(&protocol.uncut(), prepared, index))
        .collect();
    let mut cut = protocol.uncut();
    let mut kept = grids.clone();
    for reduce in [drop_repeat, drop_dose, drop_place] {
        loop {
            let costs = costs(&cut, prepared, seconds);
            if costs.iter().sum::<f64>() <= budget {
                return finish(cut.cuts, "");
            }
            // The part that takes longest of those that still have something to give.
            let candidates = kept.iter().enumerate().filter_map(|(index, grid)| {
                let is_readout = protocol.parts[index].kind == Kind::Readout;
                reduce(grid, is_readout).map(|grid| (index, grid))
            });
            let Some((index, grid)) =
                candidates.max_by(|a, b| costs[a.0].total_cmp(&costs[b.0]).then(b.0.cmp(&a.0)))
            else {
                break;
            };
            kept[index] = grid;
            cut.cuts = cuts(protocol, &grids, &kept, seconds);
        }
    }
    let total: f64 = costs(&cut, prepared, seconds).iter().sum();
    let more = format!(" (the rest is still expected to take {total:.0} s of {budget:.0})");
    finish(cut.cuts, if total > budget { &more } else { "" })
}

fn finish(mut cuts: Vec<Cut>, more: &str) -> Vec<Cut> {
    if let Some(last) = cuts.last_mut() {
        last.text.push_str(more);
    }
    cuts
}

/// Predicted seconds of each part.
fn costs(protocol: &Protocol, prepared: &Prepared, seconds: &[f64]) -> Vec<f64> {
    let grid = Grid::new(protocol, prepared);
    let cost = |(part, seconds): (usize, &f64)| grid.of_part(part).len() as f64 * seconds;
    seconds.iter().enumerate().map(cost).collect()
}

fn drop_repeat(grid: &Dimensions, _: bool) -> Option<Dimensions> {
    (grid.repeats > 1).then(|| Dimensions { repeats: grid.repeats - 1, ..grid.clone() })
}

/// A readout loses its largest dose, since the logits show small ones; a reply the smallest, since
/// it shows only large ones. Dose 0 costs nothing and stays.
fn drop_dose(grid: &Dimensions, is_readout: bool) -> Option<Dimensions> {
    let doses = grid.doses.iter().copied().filter(|dose| *dose != 0.0);
    let by_size = |a: &f64, b: &f64| a.abs().total_cmp(&b.abs());
    let dropped =
        if is_readout { doses.clone().max_by(by_size) } else { doses.clone().min_by(by_size) };
    let dropped = dropped.filter(|_| doses.count() > 1)?;
    let mut grid = grid.clone();
    grid.doses.retain(|dose| *dose != dropped);
    Some(grid)
}

/// The layer farthest from three quarters of the depth goes first: that is where concepts show.
fn drop_place(grid: &Dimensions, _: bool) -> Option<Dimensions> {
    if grid.places.len() < 2 {
        return None;
    }
    let off = |depth: f64| (depth - 0.75).abs();
    let places = grid.places.iter();
    let dropped = places.max_by(|a, b| off(a.depth).total_cmp(&off(b.depth)))?.layer;
    let mut grid = grid.clone();
    grid.places.retain(|place| place.layer != dropped);
    Some(grid)
}

fn cuts(
    protocol: &Protocol,
    before: &[Dimensions],
    after: &[Dimensions],
    seconds: &[f64],
) -> Vec<Cut> {
    let changed = (0..before.len()).filter(|index| before[*index] != after[*index]);
    changed
        .map(|index| {
            let (old, new) = (&before[index], &after[index]);
            let mut what = Vec::new();
            if old.repeats != new.repeats {
                what.push(format!("repeats {} -> {}", old.repeats, new.repeats));
            }
            if old.doses != new.doses {
                what.push(format!("doses {} -> {}", list(&old.doses), list(&new.doses)));
            }
            if old.places != new.places {
                let depths = |grid: &Dimensions| {
                    list(&grid.places.iter().map(|p| p.depth).collect::<Vec<_>>())
                };
                what.push(format!("depths {} -> {}", depths(old), depths(new)));
            }
            let name = &protocol.parts[index].name;
            let rate = 1.0 / seconds[index];
            Cut {
                part: name.clone(),
                repeats: new.repeats,
                doses: new.doses.clone(),
                layers: new.places.iter().map(|place| place.layer).collect(),
                text: format!("{name}: {} (this machine does {rate:.1} trials/s)", what.join(", ")),
            }
        })
        .collect()
}

fn list(values: &[f64]) -> String {
    let texts: Vec<String> = values.iter().map(|value| format!("{value:.3}")).collect();
    let trimmed = texts.iter().map(|text| text.trim_end_matches('0').trim_end_matches('.'));
    trimmed.collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::{fake, grid::PartOutline, results::Condition};

    fn fitted(seconds: [f64; 3], budget: f64) -> (Protocol, Prepared) {
        let mut protocol = Protocol::builtin("demo").unwrap();
        let prepared = fake::prepared(&protocol, 30);
        protocol.cuts = fit(&protocol, &prepared, &seconds, budget);
        (protocol, prepared)
    }

    fn outline(protocol: &Protocol, prepared: &Prepared) -> Vec<PartOutline> {
        Grid::new(protocol, prepared).outline()
    }

    #[test]
    fn what_fits_is_not_cut() {
        // 2001, 792 and 10 trials.
        let (protocol, _) = fitted([0.01, 0.1, 0.1], 150.0);
        assert!(protocol.cuts.is_empty());
    }

    #[test]
    fn repeats_go_first() {
        let (protocol, prepared) = fitted([0.01, 0.2, 0.2], 150.0);
        let [cut] = &protocol.cuts[..] else { panic!("{:?}", protocol.cuts) };
        assert_eq!(cut.text, "sampled: repeats 3 -> 2 (this machine does 5.0 trials/s)");
        assert_eq!((cut.doses.len(), &cut.layers[..]), (4, &[12, 20, 24, 27][..]));
        let outline = outline(&protocol, &prepared);
        assert_eq!((outline[1].injected, outline[1].clean), (512, 16));
        assert_eq!(outline[0].injected, 2000);
    }

    #[test]
    fn then_doses_then_depths_and_never_controls() {
        let (protocol, prepared) = fitted([0.05, 1.0, 1.0], 100.0);
        let outline = outline(&protocol, &prepared);
        let costs = costs(&protocol, &prepared, &[0.05, 1.0, 1.0]);
        assert!(costs.iter().sum::<f64>() <= 100.0, "{costs:?}");
        assert_eq!(outline[1].repeats, 1);
        assert!(outline[0].doses.contains(&0.125) && outline[1].doses.contains(&1.0));
        assert!(outline.iter().all(|part| part.places.iter().any(|place| place.layer == 24)));
        for (index, part) in outline.iter().enumerate() {
            let grid = Grid::new(&protocol, &prepared);
            let count = |condition| {
                grid.of_part(index).filter(|place| grid.cell(*place).condition == condition).count()
            };
            assert!(part.clean > 0 && count(Condition::Concept) > 0);
            if index < 2 {
                assert_eq!(count(Condition::Concept), count(Condition::Random));
                assert_eq!(part.words.len(), [50, 8][index], "words stay");
            }
        }
    }

    #[test]
    fn a_hopeless_machine_is_told_so() {
        let (protocol, prepared) = fitted([1.0, 60.0, 60.0], 150.0);
        let outline = outline(&protocol, &prepared);
        assert!(outline.iter().all(|part| part.places.len() == 1 && part.repeats == 1));
        assert!(protocol.cuts.last().unwrap().text.contains("still expected to take"));
    }

    #[test]
    fn spread_takes_every_entry_once() {
        let mut left: Vec<usize> = (0..10).collect();
        assert_eq!(take_spread(&mut left, 4), [1, 3, 6, 8]);
        let rest = take_spread(&mut left, 64);
        assert_eq!((rest.len(), left.len()), (6, 0));
    }

    #[test]
    fn measured_trials_are_real_ones() {
        let protocol = Protocol::builtin("demo").unwrap();
        let prepared = fake::prepared(&protocol, 30);
        let vectors = fake::vectors(&prepared);
        let plan = Plan::new(&protocol, &prepared, &vectors).unwrap();
        let engine = fake::FakeEngine::default();
        let measurement = measure(&plan, &protocol, &engine, &mut ()).unwrap();
        assert_eq!(measurement.seconds.len(), 3);
        assert!(measurement.seconds.iter().all(|seconds| *seconds > 0.0));
        assert!(measurement.trials.iter().all(|trial| plan.place_of(trial).is_some()));
    }
}
