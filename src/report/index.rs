//! A run put in order: trials sorted and grouped, each with its grade.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hasher,
};

use super::{Run, tables::Cell};
use crate::{
    experiment::results::{Condition, Criterion, Grade, Manifest, Outcome, Trial},
    request::StrengthMode,
};

/// What a part's trials hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Readout,
    /// Replies that are judged on detection.
    Sampled,
    /// Replies that are judged on something else.
    Judged,
    Ramp,
    Probe,
}

/// A trial with its grade, if it has one.
#[derive(Clone, Copy)]
pub(super) struct Entry<'a> {
    pub trial: &'a Trial,
    pub grade: Option<&'a Grade>,
}

impl Entry<'_> {
    /// Where it was injected; `None` for clean trials.
    pub fn cell(&self) -> Option<Cell> {
        let Trial { condition, layer, depth, dose, .. } = self.trial;
        (*condition != Condition::Clean).then_some(())?;
        let cell = Cell { layer: (*layer)?, depth: (*depth)?, dose: (*dose)? };
        (cell.depth.is_finite() && cell.dose.is_finite()).then_some(cell)
    }
}

/// The trials of one prompt of one part, sorted.
pub(super) struct Group<'a> {
    pub part: &'a str,
    pub prompt: &'a str,
    pub kind: Kind,
    /// What its replies are judged on.
    pub outcome: Outcome,
    /// The verdicts that make a success.
    success: Vec<Criterion>,
    pub entries: Vec<Entry<'a>>,
}

impl Group<'_> {
    /// The unit of the doses, where any was injected.
    pub fn mode(&self) -> Option<StrengthMode> {
        self.entries.iter().find_map(|e| e.trial.mode)
    }

    /// Whether a reply to the prompt is a success; none where a verdict that it takes is missing.
    pub fn succeeds(&self, grade: &Grade) -> Option<bool> {
        grade.all(&self.success)
    }

    /// The cells that any trial stands in, ascending.
    pub fn cells(&self) -> Vec<Cell> {
        let mut cells: Vec<_> = self.entries.iter().filter_map(Entry::cell).collect();
        cells.sort_by(Cell::order);
        cells.dedup();
        cells
    }
}

/// A run in an order that does not depend on ids or on the order of its files' lines.
pub(super) struct Index<'a> {
    pub manifest: &'a Manifest,
    /// All the trials, each once.
    pub entries: Vec<Entry<'a>>,
    pub groups: Vec<Group<'a>>,
    /// Whose grades are used: the judge with the most verdicts, and of equals the last by name.
    pub judge: Option<&'a str>,
    /// The others.
    pub other_judges: Vec<&'a str>,
}

impl<'a> Index<'a> {
    pub fn new(run: &'a Run) -> Self {
        let mut judges: BTreeMap<&str, HashMap<&str, &Grade>> = BTreeMap::new();
        for grade in &run.grades {
            judges.entry(&grade.judge).or_default().insert(&grade.trial, grade);
        }
        let verdicts = |grades: &HashMap<&str, &Grade>| -> usize {
            grades.values().map(|grade| grade.verdicts.len()).sum()
        };
        let judge = judges.iter().max_by_key(|(_, of)| verdicts(of)).map(|(name, _)| *name);
        let grades = judge.and_then(|judge| judges.remove(judge)).unwrap_or_default();
        let unique: BTreeMap<&str, &Trial> =
            run.trials.iter().map(|trial| (trial.id.as_str(), trial)).collect();
        let mut entries: Vec<_> = unique
            .into_iter()
            .map(|(id, trial)| Entry { trial, grade: grades.get(id).copied() })
            .collect();
        entries.sort_by(|a, b| order(a.trial, b.trial));
        let mut groups = group(&entries, &run.manifest);
        groups.sort_by_key(|group| group.kind);
        Self {
            manifest: &run.manifest,
            groups,
            entries,
            judge,
            other_judges: judges.into_keys().collect(),
        }
    }

    /// The groups of a kind, in order.
    pub fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Group<'a>> {
        self.groups.iter().filter(move |group| group.kind == kind)
    }

    /// A number that belongs to this run and `text`: the seed of resamples and of the sample of
    /// transcripts (FNV-1a).
    pub fn seed(&self, text: &str) -> u64 {
        let mut hash = Fnv(0xcbf2_9ce4_8422_2325);
        hash.write(self.manifest.run.as_bytes());
        hash.write(text.as_bytes());
        hash.finish()
    }

    /// The right answer to a prompt's question, where it has one.
    pub fn answer(&self, prompt: &str) -> Option<&str> {
        of_prompt(self.manifest, prompt)?.get("answer")?.as_str()
    }

    /// The prompts of a part, as the protocol has them.
    pub fn prompts(&self, part: &str) -> Vec<&str> {
        let parts = self.manifest.protocol.get("parts").and_then(serde_json::Value::as_array);
        let part = parts.and_then(|parts| parts.iter().find(|of| of["name"] == part));
        let prompts = part.and_then(|part| part["prompts"].as_array());
        prompts.map_or(Vec::new(), |all| all.iter().filter_map(|name| name.as_str()).collect())
    }

    /// Whether the protocol wants a section of the report.
    pub fn shows(&self, section: &str) -> bool {
        let wanted = self.manifest.protocol.get("tables").and_then(serde_json::Value::as_array);
        wanted.is_none_or(|wanted| wanted.is_empty() || wanted.iter().any(|name| name == section))
    }

    /// The word's place in the run's list.
    pub fn word(&self, word: &str) -> Option<usize> {
        self.manifest.words.iter().position(|record| record.word == word)
    }
}

/// FNV-1a, written out because the standard library's hash may change between versions.
struct Fnv(u64);

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

fn order(a: &Trial, b: &Trial) -> std::cmp::Ordering {
    let number = |x: Option<f64>| x.unwrap_or(f64::NEG_INFINITY);
    let key = |t: &'_ Trial| (t.condition, t.layer);
    (&a.part, &a.prompt)
        .cmp(&(&b.part, &b.prompt))
        .then(key(a).cmp(&key(b)))
        .then(number(a.depth).total_cmp(&number(b.depth)))
        .then(number(a.dose).total_cmp(&number(b.dose)))
        .then((&a.concept, a.repeat, a.seed).cmp(&(&b.concept, b.repeat, b.seed)))
}

/// A prompt in the run's protocol.
fn of_prompt<'a>(manifest: &'a Manifest, prompt: &str) -> Option<&'a serde_json::Value> {
    manifest.protocol.get("prompts")?.get(prompt)
}

fn group<'a>(entries: &[Entry<'a>], manifest: &Manifest) -> Vec<Group<'a>> {
    let mut kinds: BTreeMap<&str, Kind> = BTreeMap::new();
    for Entry { trial, .. } in entries {
        let kind = match (&trial.read, &trial.reply) {
            _ if trial.probe.is_some() => Kind::Probe,
            (None, Some(_)) if trial.part == "ramp" => Kind::Ramp,
            (None, Some(_)) => Kind::Sampled,
            _ => Kind::Readout,
        };
        kinds.entry(&trial.part).or_insert(kind);
    }
    let same =
        |a: &Entry, b: &Entry| (&a.trial.part, &a.trial.prompt) == (&b.trial.part, &b.trial.prompt);
    entries
        .chunk_by(same)
        .map(|entries| {
            let trial = entries[0].trial;
            let field = |name: &str| of_prompt(manifest, &trial.prompt)?.get(name).cloned();
            let outcome: Outcome =
                field("outcome").and_then(|v| serde_json::from_value(v).ok()).unwrap_or_default();
            let success = field("success").and_then(|v| serde_json::from_value(v).ok());
            let kind = match kinds[trial.part.as_str()] {
                Kind::Sampled if outcome != Outcome::Detection => Kind::Judged,
                kind => kind,
            };
            Group {
                part: &trial.part,
                prompt: &trial.prompt,
                kind,
                outcome,
                success: success.unwrap_or_else(|| outcome.success(true)),
                entries: entries.to_vec(),
            }
        })
        .collect()
}
