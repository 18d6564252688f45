//! Every reply of a run, to be searched and filtered in the page itself. The text goes into a block
//! of data; the script draws it with `textContent` alone.

use std::{cmp::Ordering, collections::HashMap, fmt::Write as _};

use serde::Serialize;
use sha2::{Digest, Sha256};

/// What stands between the page's script tags. Its hash goes into the page's policy.
const SCRIPT: &str = include_str!("explore.js");

/// Characters of a prompt that are shown before the injected window.
const TAIL: usize = 700;

/// Conditions in the order in which they are drawn.
const CONDITIONS: [&str; 7] =
    ["clean", "concept", "random", "negated", "shuffled", "other", "after"];

/// One reply with what made it and what was judged of it.
#[derive(Clone, Debug)]
pub(super) struct Row<'a> {
    /// The trial's id.
    pub id: &'a str,
    /// The protocol's part.
    pub part: &'a str,
    /// The prompt's name in the protocol.
    pub prompt: &'a str,
    /// `clean`, `concept`, `random`, `negated`, `shuffled`, `other` or `after`.
    pub condition: &'a str,
    /// The trial's word; for a clean trial the word whose seeds it shares.
    pub concept: &'a str,
    /// The word whose vector was injected, where it is not the trial's own; else empty.
    pub other: &'a str,
    /// The sentence that goes with the word, or empty.
    pub sentence: &'a str,
    /// Block of the injection; none for clean trials.
    pub layer: Option<usize>,
    /// The strength asked for; none for clean trials.
    pub dose: Option<f64>,
    /// 0-based repeat.
    pub repeat: u32,
    /// The reply.
    pub text: &'a str,
    /// Whether the reply ended at its token limit.
    pub cut: bool,
    /// (name, answer, evidence).
    pub verdicts: Vec<(&'a str, bool, &'a str)>,
    /// Whether the verdicts make a success; none where one that it takes is missing.
    pub success: Option<bool>,
}

/// A reply's prompt as the model saw it, cut at the ends of the injected window.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Prompt {
    /// Up to the window; only its last [`TAIL`] characters are shown.
    pub before: String,
    /// What the injection covers, or would in a clean trial.
    pub window: String,
    /// From the window's end to the reply.
    pub after: String,
    /// Whether the window goes on through the reply.
    pub into_reply: bool,
}

/// The section's body: controls, list, data and script; nothing without rows. `prompt` is asked
/// once for each row, for the window of the row's own condition.
pub(super) fn html<'a>(rows: &[Row<'a>], prompt: impl Fn(&Row<'a>) -> Option<Prompt>) -> String {
    if rows.is_empty() {
        return String::new();
    }
    format!(
        "<noscript><p>Searching the replies takes JavaScript; the <a \
         href=\"#transcripts\">sample below</a> shows without it.</p></noscript>\n\
         <div class=\"explore\" id=\"explore-app\" hidden>\n\
         <p>Not picked: of each condition and dose in turn, the reply whose id has the next \
         smallest hash. Filters keep this order. A click on a reply’s header opens its prompt and \
         what the verdicts rest on.</p>\n\
         <div class=\"filters\" id=\"explore-filters\" role=\"search\" \
         aria-label=\"Replies\">\n\
         <label class=\"search\">Search <input type=\"search\" id=\"explore-search\" \
         placeholder=\"reply, concept, sentence, evidence or a trial’s whole id\" \
         autocomplete=\"off\" spellcheck=\"false\"></label>\n</div>\n\
         <p class=\"count\"><span role=\"status\" aria-live=\"polite\" \
         id=\"explore-count\"></span> \
         <button type=\"button\" id=\"explore-reset\">Show all</button></p>\n\
         <figure id=\"explore-dots\"><figcaption><span id=\"explore-rates\"></span> \
         <span class=\"key concept\"></span>concept <span class=\"key clean\"></span>clean. \
         <small>One prompt at a time: the chosen one, else the first. Filters on condition, \
         concept and this verdict don’t count here. Numbers on hover; a click chooses the \
         concept.</small></figcaption>\n\
         <div class=\"scroll\" role=\"region\" tabindex=\"0\" aria-label=\"Concepts\" \
         id=\"explore-picture\"></div></figure>\n\
         <div class=\"replies\" id=\"explore-list\"></div>\n\
         <button type=\"button\" id=\"explore-more\"></button>\n</div>\n\
         <script type=\"application/json\" id=\"explore-data\">{}</script>\n\
         <script>{SCRIPT}</script>\n",
        embeddable(&data(rows, prompt))
    )
}

/// The script's source expression for the policy: `'sha256-…'`.
pub(super) fn script_hash() -> String {
    source_hash(SCRIPT)
}

/// What a policy's `script-src` calls an inline script.
fn source_hash(script: &str) -> String {
    format!("'sha256-{}'", base64(&Sha256::digest(script)))
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const SIGNS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |at: usize| u32::from(chunk.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for at in 0..4 {
            let sign = SIGNS[(bits >> (18 - 6 * at)) as usize & 63];
            out.push(if at <= chunk.len() { sign as char } else { '=' });
        }
    }
    out
}

/// The rows by columns, in the order in which they are shown. Texts are places in `strings`, of
/// which the first is empty.
#[derive(Debug, Default, Serialize)]
struct Data {
    strings: Vec<String>,
    id: Vec<String>,
    prompt: Vec<usize>,
    condition: Vec<usize>,
    concept: Vec<usize>,
    other: Vec<usize>,
    sentence: Vec<usize>,
    layer: Vec<Option<usize>>,
    dose: Vec<Option<f64>>,
    repeat: Vec<u32>,
    text: Vec<usize>,
    /// One sign for each row, as [`sign`] writes it.
    cut: String,
    success: String,
    verdicts: Vec<Column>,
    /// Of each row the place in `contexts`.
    context: Vec<Option<usize>>,
    /// Before, window, after, into the reply.
    contexts: Vec<(usize, usize, usize, bool)>,
}

/// The verdicts of one name.
#[derive(Debug, Serialize)]
struct Column {
    name: String,
    answers: String,
    evidence: Vec<usize>,
}

fn data<'a>(rows: &[Row<'a>], prompt: impl Fn(&Row<'a>) -> Option<Prompt>) -> Data {
    let (mut strings, mut contexts) = (Table::default(), Table::default());
    strings.place(String::new());
    // The script sorts conditions by their places.
    CONDITIONS.iter().for_each(|name| _ = strings.place((*name).into()));
    let mut of = |text: &str| strings.place(visible(text));
    let names = names(rows);
    let rows: Vec<&Row> = order(rows).into_iter().map(|at| &rows[at]).collect();
    let mut data = Data::default();
    for row in &rows {
        data.id.push(visible(row.id));
        data.prompt.push(of(&format!("{} / {}", row.part, row.prompt)));
        data.condition.push(of(row.condition));
        data.concept.push(of(row.concept));
        data.other.push(of(row.other));
        data.sentence.push(of(row.sentence));
        data.layer.push(row.layer);
        data.dose.push(row.dose);
        data.repeat.push(row.repeat);
        data.text.push(of(row.text.trim()));
        data.cut.push(sign(Some(row.cut)));
        data.success.push(sign(row.success));
        data.context.push(prompt(row).map(|prompt| {
            let texts = (of(&tail(&prompt.before)), of(&prompt.window), of(&prompt.after));
            contexts.place((texts.0, texts.1, texts.2, prompt.into_reply))
        }));
    }
    data.verdicts = names
        .into_iter()
        .map(|name| {
            let mut column =
                Column { name: visible(name), answers: String::new(), evidence: Vec::new() };
            for row in &rows {
                let verdict = row.verdicts.iter().find(|verdict| verdict.0 == name);
                column.answers.push(sign(verdict.map(|verdict| verdict.1)));
                column.evidence.push(of(verdict.map_or("", |verdict| verdict.2)));
            }
            column
        })
        .collect();
    data.strings = strings.into_list();
    data.contexts = contexts.into_list();
    data
}

/// Of each condition and dose in turn the row whose id has the next smallest hash.
fn order(rows: &[Row]) -> Vec<usize> {
    let mut drawn: Vec<_> = rows.iter().enumerate().map(|(at, row)| Drawn::new(at, row)).collect();
    drawn.sort_by(|a, b| a.by_stratum(b).then(a.hash.cmp(&b.hash)));
    let mut order: Vec<_> = drawn
        .chunk_by(|a, b| a.by_stratum(b) == Ordering::Equal)
        .enumerate()
        .flat_map(|(stratum, rows)| {
            rows.iter().enumerate().map(move |(round, row)| (round, stratum, row.at))
        })
        .collect();
    order.sort_unstable();
    order.into_iter().map(|(.., at)| at).collect()
}

/// What decides on a row's place.
struct Drawn {
    condition: usize,
    dose: f64,
    hash: [u8; 32],
    at: usize,
}

impl Drawn {
    fn new(at: usize, row: &Row) -> Self {
        let condition = CONDITIONS.iter().position(|name| *name == row.condition);
        Self {
            condition: condition.unwrap_or(CONDITIONS.len()),
            dose: row.dose.unwrap_or(f64::NEG_INFINITY),
            hash: Sha256::digest(row.id).into(),
            at,
        }
    }

    fn by_stratum(&self, other: &Self) -> Ordering {
        self.condition.cmp(&other.condition).then(self.dose.total_cmp(&other.dose))
    }
}

/// The verdicts' names in the order in which they first occur.
fn names<'a>(rows: &[Row<'a>]) -> Vec<&'a str> {
    let mut names = Vec::new();
    for (name, ..) in rows.iter().flat_map(|row| &row.verdicts) {
        if !names.contains(name) {
            names.push(*name);
        }
    }
    names
}

/// Values, each once, by their places.
#[derive(Debug)]
struct Table<T>(HashMap<T, usize>);

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: Eq + std::hash::Hash> Table<T> {
    fn place(&mut self, value: T) -> usize {
        let next = self.0.len();
        *self.0.entry(value).or_insert(next)
    }

    fn into_list(self) -> Vec<T> {
        let mut list: Vec<_> = self.0.into_iter().collect();
        list.sort_unstable_by_key(|(_, place)| *place);
        list.into_iter().map(|(value, _)| value).collect()
    }
}

fn sign(answer: Option<bool>) -> char {
    match answer {
        Some(true) => '1',
        Some(false) => '0',
        None => '-',
    }
}

/// The last [`TAIL`] characters, after an ellipsis where something is left out.
fn tail(text: &str) -> String {
    match text.char_indices().rev().nth(TAIL) {
        Some((at, c)) => format!("…{}", &text[at + c.len_utf8()..]),
        None => text.into(),
    }
}

/// Control characters, and those that reverse the direction of writing, made visible as `escape`
/// does.
fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' => {
                let _ = write!(out, "⟨U+{:04X}⟩", c as u32);
            }
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// JSON that no text in it can break out of. The signs stand in strings only, where the escape
/// means the same.
fn embeddable(data: &Data) -> String {
    let json = serde_json::to_string(data).expect("strings and numbers");
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests;
