//! What the stream holds of a word that is to be thought of, or not, while something else is written.

use std::collections::BTreeMap;

use super::{Entry, Group, Index, ProbeContrast, ProbeCurve, ProbePoint, ProbeTable};
use crate::{
    experiment::{
        results::Probed,
        stats::{self, Interval},
    },
    report::index::Kind,
};

/// Parts of the sentence that the maps by token show: tokens are put in them by their relative place.
pub(in crate::report) const BINS: usize = 8;

pub(super) fn tables(index: &Index) -> Vec<ProbeTable> {
    let mut parts: BTreeMap<&str, Vec<&Group>> = BTreeMap::new();
    for group in index.of_kind(Kind::Probe) {
        parts.entry(group.part).or_default().push(group);
    }
    parts.into_iter().filter_map(|(part, groups)| table(index, part, &groups)).collect()
}

/// By trial's word and repeat.
type Trials<'a> = BTreeMap<(&'a str, u32), &'a Probed>;

fn trials<'a>(group: &Group<'a>) -> Trials<'a> {
    let of =
        |e: &Entry<'a>| Some(((e.trial.concept.as_str(), e.trial.repeat), e.trial.probe.as_ref()?));
    group.entries.iter().filter_map(of).collect()
}

fn table(index: &Index, part: &str, groups: &[&Group]) -> Option<ProbeTable> {
    let by_prompt: Vec<(&str, Trials)> =
        groups.iter().map(|group| (group.prompt, trials(group))).collect();
    let layers = by_prompt.iter().find_map(|(_, trials)| trials.values().next())?.layers.clone();
    let seed = index.seed(&format!("probes {part}"));
    let curves = by_prompt.iter().map(|(prompt, trials)| curve(prompt, trials, &layers, seed));
    let pairs = contrasts(index, part);
    let of = |name: &str| by_prompt.iter().find(|(prompt, _)| *prompt == name).map(|(_, t)| t);
    let contrasts = pairs.iter().filter_map(|(first, second)| {
        let (points, overall) = differences(of(first)?, of(second)?, layers.len(), seed);
        let (first, second) = (first.clone(), second.clone());
        Some(ProbeContrast { first, second, points, overall })
    });
    Some(ProbeTable {
        part: part.into(),
        curves: curves.collect(),
        contrasts: contrasts.collect(),
        layers,
    })
}

/// The pairs of prompts that the protocol names.
fn contrasts(index: &Index, part: &str) -> Vec<(String, String)> {
    let parts = index.manifest.protocol.get("parts").and_then(serde_json::Value::as_array);
    let part = parts.and_then(|parts| parts.iter().find(|p| p["name"] == part));
    let pairs = part.and_then(|part| part.get("contrasts"));
    pairs.and_then(|pairs| serde_json::from_value(pairs.clone()).ok()).unwrap_or_default()
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len().max(1) as f64
}

/// Mean of every word's values by resampling words; `None` as an interval below 20 words.
fn point(values: &[f64], seed: u64) -> ProbePoint {
    let all = |weights: &[u32]| {
        let weighted = values.iter().zip(weights).map(|(v, w)| (v * f64::from(*w), f64::from(*w)));
        let (sum, n) = weighted.fold((0.0, 0.0), |(a, b), (v, w)| (a + v, b + w));
        vec![(n > 0.0).then(|| sum / n)]
    };
    let interval = stats::bootstrap(values.len(), 1, seed, all);
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    ProbePoint { mean, interval: interval[0] }
}

/// (word, value): repeats of a word are one value, their mean.
fn by_word<'a>(values: impl Iterator<Item = (&'a str, f64)>) -> Vec<f64> {
    let mut words: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for (word, value) in values {
        let of = words.entry(word).or_default();
        *of = (of.0 + value, of.1 + 1.0);
    }
    words.into_values().map(|(sum, n)| sum / n).collect()
}

fn curve(prompt: &str, trials: &Trials, layers: &[usize], seed: u64) -> ProbeCurve {
    let values = |of: &dyn Fn(&Probed) -> Option<f64>| {
        by_word(trials.iter().filter_map(|((word, _), p)| Some((*word, of(p)?))))
    };
    let points =
        (0..layers.len()).map(|layer| point(&values(&|p| Some(mean(p.cosine.get(layer)?))), seed));
    let range = |layer: usize| {
        let low = values(&|p| p.range.get(layer).map(|range| f64::from(range.0)));
        let high = values(&|p| p.range.get(layer).map(|range| f64::from(range.1)));
        (!low.is_empty())
            .then(|| Interval { low: point(&low, seed).mean, high: point(&high, seed).mean })
    };
    let above = |layer: usize| {
        let above = trials.values().filter(|p| {
            let own = p.cosine.get(layer).map(|cosine| mean(cosine));
            own.zip(p.range.get(layer)).is_some_and(|(own, range)| own > f64::from(range.1))
        });
        above.count() as u64
    };
    ProbeCurve {
        prompt: prompt.into(),
        trials: trials.len() as u64,
        points: points.collect(),
        bands: (0..layers.len()).map(range).collect(),
        above: (0..layers.len()).map(above).collect(),
        map: (0..layers.len()).map(|layer| bins(trials, layer)).collect(),
    }
}

/// Mean cosine of each part of the sentence; none where no token falls in it.
fn bins(trials: &Trials, layer: usize) -> Vec<Option<f64>> {
    let mut sums = [(0.0, 0.0); BINS];
    for cosine in trials.values().filter_map(|p| p.cosine.get(layer)) {
        for (at, value) in cosine.iter().enumerate() {
            let bin = (at * BINS / cosine.len()).min(BINS - 1);
            sums[bin] = (sums[bin].0 + f64::from(*value), sums[bin].1 + 1.0);
        }
    }
    sums.into_iter().map(|(sum, n)| (n > 0.0).then(|| sum / n)).collect()
}

/// Of trials of the same word and repeat: at each layer, and the mean over the layers.
fn differences(
    first: &Trials,
    second: &Trials,
    layers: usize,
    seed: u64,
) -> (Vec<ProbePoint>, ProbePoint) {
    let of = |difference: &dyn Fn(&Probed, &Probed) -> Option<f64>| {
        let pairs =
            first.iter().filter_map(|(key, a)| Some((key.0, difference(a, second.get(key)?)?)));
        point(&by_word(pairs), seed)
    };
    let at =
        |layer: usize| of(&|a, b| Some(mean(a.cosine.get(layer)?) - mean(b.cosine.get(layer)?)));
    let over_layers = |of: &Probed| {
        let means = of.cosine.iter().map(|cosine| mean(cosine));
        means.sum::<f64>() / of.cosine.len().max(1) as f64
    };
    let overall = of(&|a, b| Some(over_layers(a) - over_layers(b)));
    ((0..layers).map(at).collect(), overall)
}
