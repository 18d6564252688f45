//! The HTML report, section by section.

mod about;
mod bias;
mod every_reply;
mod explore;
mod heat;
mod intents;
mod outcomes;
mod probes;
mod prompts;
mod readout;
mod receipts;
mod replies;
mod texts;
mod transcripts;

use super::{
    format::{percent, percents},
    headline::Headline,
    html::{escape, paragraph, prose, section},
    index::Index,
    tables::Tables,
};

/// Sections that no protocol leaves out.
const ALWAYS: [&str; 4] = ["run", "read", "prompts", "limits"];
const STYLE: &str = concat!(include_str!("style.css"), include_str!("explore.css"));

pub(super) fn build(index: &Index, tables: &Tables, headline: &Headline) -> String {
    let sections = [
        ("explore", "Every reply, to be searched", every_reply::html(index)),
        ("transcripts", "Transcripts, drawn at random", transcripts::sample(index)),
        ("run", "What was run", about::run(index, tables)),
        ("read", "How to read this", about::reading()),
        ("prompts", "What the model saw", prompts::html(index)),
        ("receipts", "What was changed", receipts::html(tables)),
        ("readout", "What the logits show", readout::html(index, tables, headline)),
        ("margins", "Yes or no, without sampling", readout::margins(tables)),
        ("bias", "Is “yes” just pushed up?", bias::html(tables)),
        ("replies", "What the replies say", replies::html(tables)),
        ("detection", "Hits against false alarms", replies::detection(tables)),
        ("outcomes", "How often it succeeds", outcomes::html(tables)),
        ("texts", "Thought against text", texts::html(tables)),
        ("intents", "Is a word that was put in its mouth owned?", intents::html(tables)),
        ("probes", "What is thought of while writing", probes::html(tables)),
        ("ramp", "One word, dose by dose", transcripts::ramp(index)),
        ("limits", "What this can't show", about::limits(index, headline)),
    ];
    let sections = sections.map(|(id, title, body)| {
        (id, title, if ALWAYS.contains(&id) || index.shows(id) { body } else { String::new() })
    });
    let links: String = sections
        .iter()
        .filter(|(_, _, body)| !body.is_empty())
        .map(|(id, title, _)| format!("<a href=\"#{id}\">{title}</a>"))
        .collect();
    let body: String = sections.iter().map(|(id, title, body)| section(id, title, body)).collect();
    let (conclusion, sentences) = lead(headline);
    let title = format!("{} · {}", about::name(index), escape(&index.manifest.model.name));
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta \
         name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta \
         http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src \
         'unsafe-inline'; script-src {}\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <main>\n<h1>{title}</h1>\n{conclusion}{}{sentences}<nav aria-label=\"Sections\">{links}</nav>\n{body}</main>\n\
         {}</body>\n</html>\n",
        explore::script_hash(),
        facts(headline),
        about::footer(index)
    )
}

/// What follows, to be set above the numbers, and the sentences it rests on.
fn lead(headline: &Headline) -> (String, String) {
    let (conclusion, sentences) = headline.lead();
    let rest: String = sentences.iter().map(|sentence| paragraph(&prose(sentence))).collect();
    (format!("<p class=\"lead\">{}</p>\n", prose(&conclusion)), rest)
}

/// The four numbers that the rest explains.
fn facts(headline: &Headline) -> String {
    let mut facts = Vec::new();
    if let Some(read) = &headline.read {
        facts.push((
            format!("{} of {}", read.held_out.k, read.held_out.n),
            "held-out concepts readable in the logits".to_owned(),
            format!("random vectors: {} of {}", read.random.k, read.random.n),
        ));
    }
    if let Some(replies) = &headline.replies {
        let contrast = &replies.contrast;
        let share = |rate: Option<crate::experiment::stats::Rate>| {
            rate.map_or("–".into(), |rate| percent(rate.share))
        };
        facts.push((
            percent(replies.mentions.share),
            "of replies mention the concept".into(),
            format!("clean: {}", replies.mentions_chance.map_or("–".into(), percent)),
        ));
        facts.push((
            percent(contrast.hits.share),
            "claim to detect a thought".into(),
            format!("random: {}, clean: {}", share(contrast.random), share(contrast.clean)),
        ));
        facts.push((
            percent(contrast.identified.share),
            "claim, then name it, coherently".into(),
            percents(contrast.identified.interval),
        ));
    }
    if facts.is_empty() {
        return String::new();
    }
    let boxes: String = facts
        .iter()
        .map(|(value, what, note)| {
            format!("<div><b>{value}</b><span>{what}</span><small>{note}</small></div>\n")
        })
        .collect();
    format!("<div class=\"facts\">\n{boxes}</div>\n")
}

/// A heading for one of several tables of a section.
fn subtitle(part: &str, prompt: &str, mode: Option<crate::request::StrengthMode>) -> String {
    let unit = super::format::unit(mode);
    let unit = if unit.is_empty() { String::new() } else { format!("doses {unit}") };
    format!("<h3>{} / {} <small>{unit}</small></h3>\n", escape(part), escape(prompt))
}
