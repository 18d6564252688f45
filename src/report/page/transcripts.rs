//! Replies to read: the ramp, and a random sample with the verdicts' evidence.

use std::collections::BTreeSet;

use crate::{
    engine::Finish,
    experiment::results::{Condition, Grade, Reply, Verdict},
    report::{
        format::{condition, depth, unit},
        html::{escape, paragraph},
        index::{Entry, Group, Index, Kind},
    },
};

/// Transcripts shown of each condition and dose.
const DRAWN: usize = 2;

/// The replies of each dose, the prompts side by side.
pub(super) fn ramp(index: &Index) -> String {
    let groups: Vec<_> = index.of_kind(Kind::Ramp).collect();
    let entries = || groups.iter().flat_map(|group| &group.entries);
    let doses: BTreeSet<_> = entries().map(dose_key).collect();
    if doses.is_empty() {
        return String::new();
    }
    let words: BTreeSet<_> =
        entries().map(|e| e.trial.concept.as_str()).filter(|word| !word.is_empty()).collect();
    let words: Vec<_> = words.into_iter().map(escape).collect();
    let mut depths: Vec<_> = entries().filter_map(Entry::cell).map(|cell| depth(&cell)).collect();
    depths.sort();
    depths.dedup();
    let mut out = paragraph(&format!(
        "“{}” at depth {} and rising doses, the same seed throughout; the prompts side by side.",
        words.join("”, “"),
        depths.join(", ")
    ));
    for dose in doses {
        let at: Vec<_> = groups
            .iter()
            .flat_map(|group| group.entries.iter().map(move |e| (group, e)))
            .filter(|(_, e)| dose_key(e) == dose)
            .collect();
        let title = match at.first().and_then(|(group, e)| Some((group.mode(), e.cell()?.dose))) {
            Some((mode, dose)) => format!("Dose {dose} {}", unit(mode)),
            None => "Clean".to_owned(),
        };
        let cards: String = at.iter().filter_map(|(group, e)| step(group, e)).collect();
        out += &format!("<h3>{title}</h3>\n<div class=\"replies\">\n{cards}</div>\n");
    }
    out
}

/// Doses in order, clean first: a whole number in the order of `f64::total_cmp`.
fn dose_key(entry: &Entry) -> Option<i64> {
    let bits = entry.cell()?.dose.to_bits() as i64;
    Some(bits ^ (((bits >> 63) as u64) >> 1) as i64)
}

/// Of each condition and dose, the transcripts whose hash with the run is smallest.
pub(super) fn sample(index: &Index) -> String {
    let groups = index.of_kind(Kind::Sampled).chain(index.of_kind(Kind::Judged));
    let parts: String = groups.map(|group| strata(index, group)).collect();
    if parts.is_empty() {
        return parts;
    }
    let intro = format!(
        "Not picked: of each condition and dose, {DRAWN} replies drawn by the run's hash, with \
         every verdict and what it rests on."
    );
    paragraph(&intro) + &parts
}

fn strata(index: &Index, group: &Group) -> String {
    let mut drawn: Vec<_> = group
        .entries
        .iter()
        .filter(|e| e.trial.reply.is_some())
        .map(|e| (e.trial.condition, dose_key(e), index.seed(&e.trial.id), e))
        .collect();
    drawn.sort_by_key(|(condition, dose, seed, _)| (*condition, *dose, *seed));
    let cards: String = drawn
        .chunk_by(|a, b| (a.0, a.1) == (b.0, b.1))
        .flat_map(|stratum| stratum.iter().take(DRAWN))
        .filter_map(|(.., entry)| card(group, entry))
        .collect();
    super::subtitle(group.part, group.prompt, group.mode())
        + &format!("<div class=\"replies\">\n{cards}</div>\n")
}

/// One reply with its facts and every verdict's evidence.
fn card(group: &Group, entry: &Entry) -> Option<String> {
    let trial = entry.trial;
    let name = condition(trial.condition);
    let mut facts = vec![format!("<b>{name}</b>")];
    if let Some(other) = &trial.other {
        facts.push(format!("“{}”", escape(other)));
    }
    if !trial.concept.is_empty() {
        let what = if trial.condition == Condition::Concept { "" } else { "for " };
        facts.push(format!("{what}“{}”", escape(&trial.concept)));
    }
    facts.extend(trial.sentence.as_ref().map(|sentence| format!("“{}”", escape(sentence))));
    if let Some(cell) = entry.cell() {
        facts.push(format!("depth {}, dose {}", depth(&cell), cell.dose));
    }
    facts.push(format!("repeat {}", trial.repeat + 1));
    article(group, entry, &facts.join(" · "), "", |verdict| escape(&verdict.evidence))
}

/// One reply with its verdicts as signs; the prompt's name above it.
fn step(group: &Group, entry: &Entry) -> Option<String> {
    let header = format!("<b>{}</b>", escape(group.prompt));
    article(group, entry, &header, "chips", |_| String::new())
}

fn article(
    group: &Group,
    entry: &Entry,
    header: &str,
    class: &str,
    evidence: impl Fn(&Verdict) -> String,
) -> Option<String> {
    let reply = entry.trial.reply.as_ref()?;
    let list = |grade| verdicts(group, grade, evidence);
    let verdicts = entry.grade.map_or("<li>no verdict yet</li>\n".into(), list);
    Some(format!(
        "<article class=\"reply {}\"><header title=\"trial {}\">{header}</header>\n<blockquote>{}\
         </blockquote>\n<ul class=\"{class}\">{verdicts}</ul></article>\n",
        condition(entry.trial.condition),
        escape(&entry.trial.id),
        body(reply, entry.grade)
    ))
}

/// The reply with what the verdicts quote marked.
fn body(reply: &Reply, grade: Option<&Grade>) -> String {
    if reply.text.trim().is_empty() {
        return "<small>(empty)</small>".into();
    }
    let cut = if reply.finish == Finish::Length { " <small>[cut]</small>" } else { "" };
    let quotations = grade.into_iter().flat_map(|grade| {
        grade.verdicts.keys().filter_map(|criterion| grade.quotation(*criterion))
    });
    let ranges = quotations.map(|(at, text)| at..at + text.len());
    let mut ranges: Vec<_> =
        ranges.filter(|range| reply.text.get(range.clone()).is_some()).collect();
    ranges.sort_by_key(|range| range.start);
    let (mut out, mut done) = (String::new(), 0);
    for range in ranges {
        if range.start < done {
            continue; // in or across one that is marked
        }
        out += &escape(&reply.text[done..range.start]);
        out += &format!("<mark>{}</mark>", escape(&reply.text[range.clone()]));
        done = range.end;
    }
    (out + &escape(&reply.text[done..])).trim().to_owned() + cut
}

fn verdicts(group: &Group, grade: &Grade, evidence: impl Fn(&Verdict) -> String) -> String {
    let items = grade.verdicts.iter().map(|(criterion, verdict)| {
        let (class, sign) = if verdict.yes { ("yes", "✓") } else { ("no", "✗") };
        let (name, evidence) = (criterion.name().replace('_', " "), evidence(verdict));
        format!("<li class=\"{class}\"><b>{sign} {name}</b> {evidence}</li>\n")
    });
    let missing = grade.missing.iter().map(|(criterion, why)| {
        format!("<li><b>? {}</b> no verdict: {}</li>\n", criterion.name(), escape(why))
    });
    let both = match group.succeeds(grade) {
        Some(true) if grade.verdicts.len() > 1 => "<li class=\"yes\"><b>✓ success</b></li>\n",
        _ => "",
    };
    items.chain(missing).collect::<String>() + both
}
