//! What was run, how to read it, what it can't show.

use crate::{
    experiment::stats::{ASSUMED_CORRELATION, MIN_CLUSTERS},
    report::{
        Meaning,
        format::{number, percent, plural, thousands},
        headline::Headline,
        html::{Table, details, escape, paragraph},
        index::Index,
        tables::Tables,
    },
};

/// The protocol's name, escaped.
pub(super) fn name(index: &Index) -> String {
    let name = index.manifest.protocol.get("name").and_then(serde_json::Value::as_str);
    escape(name.unwrap_or("inkling"))
}

pub(super) fn run(index: &Index, tables: &Tables) -> String {
    let manifest = index.manifest;
    let (model, numerics, progress) = (&manifest.model, &manifest.numerics, tables.progress);
    let part = |group: &crate::report::index::Group| {
        let words: std::collections::BTreeSet<_> = group
            .entries
            .iter()
            .map(|e| e.trial.concept.as_str())
            .filter(|w| !w.is_empty())
            .collect();
        format!(
            "{} / {}: {}, {}, {}",
            escape(group.part),
            escape(group.prompt),
            plural(group.entries.len(), "trial"),
            plural(words.len(), "word"),
            plural(group.cells().len(), "cell")
        )
    };
    let parts: Vec<_> = index.groups.iter().map(part).collect();
    let mut rows = vec![
        (
            "Model",
            format!(
                "{}: {}, {} parameters, {} blocks, width {}",
                escape(&model.name),
                escape(&model.architecture),
                thousands(model.parameters),
                model.layers,
                model.dim
            ),
        ),
        (
            "Computed on",
            format!(
                "{}, {} ({}, kernels {})",
                escape(&numerics.device),
                escape(&numerics.dtype),
                escape(&numerics.isa),
                escape(&numerics.kernels)
            ),
        ),
        (
            "Trials",
            format!(
                "{} of {}{}",
                thousands(progress.done),
                thousands(progress.planned),
                if progress.done < progress.planned { " (unfinished)" } else { "" }
            ),
        ),
        ("Parts", parts.join("<br>")),
        (
            "Replies",
            format!(
                "{}, of which {} without a verdict; {} verdicts missing",
                thousands(progress.replies),
                thousands(progress.ungraded),
                thousands(progress.missing)
            ),
        ),
        ("Judge", index.judge.map_or("none yet".into(), escape)),
    ];
    if !index.other_judges.is_empty() {
        let others: Vec<_> = index.other_judges.iter().map(|judge| escape(judge)).collect();
        rows.push(("Not shown", format!("verdicts of {}", others.join(", "))));
    }
    let cuts: Vec<_> = manifest.cuts.iter().map(|cut| escape(cut)).collect();
    rows.push(("Left out", if cuts.is_empty() { "nothing".into() } else { cuts.join("<br>") }));
    let rows: String =
        rows.iter().map(|(term, text)| format!("<dt>{term}</dt><dd>{text}</dd>\n")).collect();
    let json = serde_json::to_string_pretty(&manifest.protocol).unwrap_or_default();
    let protocol =
        format!("<div class=\"scroll\"><pre><code>{}</code></pre></div>\n", escape(&json));
    format!(
        "<dl>\n{rows}</dl>\n{}{}",
        words(index),
        details("The protocol as it was resolved", &protocol)
    )
}

fn words(index: &Index) -> String {
    let words = &index.manifest.words;
    let mut table = Table::new(
        "Words: tokens, and the norm of the vector by layer",
        &["word", "tokens", "first token", "‖v‖ (layer)"],
    );
    for word in words {
        let norms: Vec<_> = word
            .norms
            .iter()
            .map(|(layer, norm)| format!("{} (L{layer})", number(Some(f64::from(*norm)))))
            .collect();
        let first = format!("<code>{}</code>", escape(&word.first_piece));
        table.row("", &[escape(&word.word), word.tokens.to_string(), first, norms.join(" · ")]);
    }
    let several = words.iter().filter(|word| word.tokens > 1).count();
    if words.is_empty() {
        return String::new();
    }
    details(&format!("{} words, {several} of them of several tokens", words.len()), &table.html())
}

pub(super) fn reading() -> String {
    let paragraphs = [
        "A <b>concept vector</b> is what a word adds to the model's residual stream. It is added \
         to the stream at one depth while the model reads the question and answers it; the \
         <b>dose</b> says how strongly. The same is done with <b>random</b> vectors of the same \
         norm, and the same prompts and seeds are run <b>clean</b>, with nothing added.",
        "<b>Readable</b>: of all the words, the injected one gained most in the next-token logits. \
         <b>Coherent</b>: the reply is neither garbled nor looping. <b>Claims</b>: it says that it \
         detects a thought. <b>Mentions</b>: the concept's word, or a near relation, stands in it. \
         <b>Identified</b> (I): coherent, and the claim comes before the first mention. Claims \
         under a concept's vector are hits (H), claims under the controls false alarms (F).",
        "Mentioning is not noticing: a strong vector makes the model write the word. A model that \
         notices must claim more often with a concept than with a random vector or with none, and \
         then name it. So look at H − F and I − F, not at H or I alone.",
        "Brackets are 95% intervals. One cell is a depth and a dose; the best of many cells looks \
         better than it is.",
    ];
    paragraphs.map(paragraph).concat()
}

pub(super) fn limits(index: &Index, headline: &Headline) -> String {
    let judge = index.judge.map(|judge| {
        if judge.starts_with("rules") {
            "The judge is a set of rules, not a reader. It knows claims by their phrases, mentions by \
             word lists with forms and relations, and coherence by likelihood under the clean model \
             and by repetition; a claim in unforeseen words, or an odd but fluent answer, is judged \
             wrongly. Read the transcripts."
        } else {
            "The judge is a model. It was right on texts whose verdict is known, which says little of \
             these replies: compare it with your own reading of some (`inkling agreement`)."
        }
    });
    let mut items: Vec<String> = judge.map(str::to_owned).into_iter().collect();
    items.extend([
        "A random vector of equal norm is not equally disturbing: concept vectors lie where the \
         model writes. A difference from random vectors alone is not detection, and neither is one \
         from clean replies alone."
            .into(),
        format!(
            "Trials of one word share its vector and seeds. From {MIN_CLUSTERS} words on, \
             differences are resampled by word; with fewer, or with no or only hits, intervals are \
             Wilson's and Newcombe's with n / (1 + (m − 1)ρ) instead of n trials (m a word: its \
             trials; ρ estimated, or {ASSUMED_CORRELATION} where the data can't tell). McNemar's p \
             takes pairs as independent and is too small where they are not."
        ),
        "d′ is shown from 20 trials an arm on. AUROC needs no threshold, but where yes and no \
         together have less than 5% of the probability it is about an answer the model would not \
         give."
            .into(),
    ]);
    if let Some(replies) = &headline.replies {
        let alarms = replies.contrast.random.or(replies.contrast.clean);
        let text = match (replies.smallest_effect, alarms) {
            (Some(effect), Some(alarms)) => format!(
                "<b>The smallest effect this run could have seen</b> (80% power, all cells \
                 together): claims {:.1} percentage points above the false alarms' {}. Anything \
                 smaller would most likely have gone unnoticed.",
                100.0 * effect,
                percent(alarms.share)
            ),
            _ => "This run is too small to have seen any effect.".into(),
        };
        items.push(text);
    }
    if index.judge.is_some() && headline.meaning != Meaning::Open {
        items.push(
            "Its conclusion pools all cells. An effect in one cell alone would be diluted; it would \
             have to be chosen on one set of words and shown on another."
                .into(),
        );
    }
    let items: String = items.iter().map(|item| format!("<li>{item}</li>\n")).collect();
    format!("<ul>\n{items}</ul>\n")
}

pub(super) fn footer(index: &Index) -> String {
    let manifest = index.manifest;
    format!(
        "<footer>inkling {} · run <code>{}</code> · model <code>{}</code> · file layout {}</footer>\n",
        escape(&manifest.version),
        escape(&manifest.run),
        escape(&manifest.model.hash),
        manifest.schema
    )
}
