//! All replies of a run with their prompts, for the section that searches them.

use std::collections::HashMap;

use super::explore::{self, Prompt, Row};
use crate::{
    engine::Finish,
    experiment::results::{Condition, PromptRecord},
    report::{
        format::condition,
        index::{Entry, Group, Index, Kind},
    },
};

pub(super) fn html(index: &Index) -> String {
    // The ramp has a section of its own.
    let groups = [Kind::Sampled, Kind::Judged].map(|kind| index.of_kind(kind));
    let rows = groups
        .into_iter()
        .flatten()
        .flat_map(|group| group.entries.iter().filter_map(move |entry| row(group, entry)));
    let rows: Vec<Row> = rows.collect();
    let prompts: HashMap<&str, &PromptRecord> =
        index.manifest.prompts.iter().map(|prompt| (prompt.name.as_str(), prompt)).collect();
    explore::html(&rows, |row| prompt(&prompts, row))
}

fn row<'a>(group: &Group<'a>, entry: &Entry<'a>) -> Option<Row<'a>> {
    let trial = entry.trial;
    let reply = trial.reply.as_ref()?;
    let verdicts = entry.grade.iter().flat_map(|grade| &grade.verdicts);
    Some(Row {
        id: &trial.id,
        part: group.part,
        prompt: group.prompt,
        condition: condition(trial.condition),
        concept: &trial.concept,
        other: trial.other.as_deref().unwrap_or_default(),
        sentence: trial.sentence.as_deref().unwrap_or_default(),
        layer: trial.layer,
        dose: trial.dose,
        repeat: trial.repeat,
        text: &reply.text,
        cut: reply.finish == Finish::Length,
        verdicts: verdicts
            .map(|(criterion, verdict)| (criterion.name(), verdict.yes, verdict.evidence.as_str()))
            .collect(),
        success: entry.grade.and_then(|grade| group.succeeds(grade)),
    })
}

/// The prompt's record has the words that its texts hold in its name.
fn prompt(prompts: &HashMap<&str, &PromptRecord>, row: &Row) -> Option<Prompt> {
    let Row { prompt, concept, sentence, .. } = row;
    let names = [
        format!("{prompt} ({concept} | {sentence})"),
        format!("{prompt} ({sentence})"),
        format!("{prompt} ({concept})"),
        (*prompt).to_owned(),
    ];
    let record = names.iter().find_map(|name| prompts.get(name.as_str()))?;
    let is_after = row.condition == condition(Condition::After);
    let (from, to) = record.after.filter(|_| is_after).unwrap_or((record.from, record.to));
    let end = to.unwrap_or(record.pieces.len());
    Some(Prompt {
        before: record.pieces.get(..from)?.concat(),
        window: record.pieces.get(from..end)?.concat(),
        after: record.pieces.get(end..)?.concat(),
        into_reply: to.is_none(),
    })
}
