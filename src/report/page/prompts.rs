//! Each prompt token by token, with the injected window marked.

use crate::{
    experiment::results::PromptRecord,
    report::{
        html::{escape, paragraph},
        index::Index,
    },
};

pub(super) fn html(index: &Index) -> String {
    let prompts = &index.manifest.prompts;
    if prompts.is_empty() {
        return String::new();
    }
    let legend = "<ul class=\"legend\"><li><span class=\"key in\"></span>inside the injected \
                  window</li><li><span class=\"key special\"></span>special token</li><li>· space, \
                  ⏎ line break</li><li>position and id on hover</li></ul>\n";
    // Prompts that differ from word to word have the word in brackets behind their name.
    let plain = |prompt: &PromptRecord| prompt.name.split(" (").next().unwrap_or("").to_owned();
    let all: Vec<&PromptRecord> = prompts.iter().collect();
    let strips = all.chunk_by(|a, b| plain(a) == plain(b)).map(|same| {
        let more = match same.len() - 1 {
            0 => String::new(),
            more => paragraph(&format!("And {more} more with other words.")),
        };
        strip(same[0]) + &more
    });
    format!("{legend}{}", strips.collect::<String>())
}

fn strip(prompt: &PromptRecord) -> String {
    let length = prompt.pieces.len();
    let (from, to) = prompt.probe.map_or((prompt.from, prompt.to), |(from, to)| (from, Some(to)));
    let end = to.map_or("the end of the reply".to_owned(), |to| format!("token {to}"));
    let inside = |at: usize| at >= from && to.is_none_or(|to| at < to);
    let mut boxes = String::new();
    for (at, piece) in prompt.pieces.iter().enumerate() {
        let mut classes = Vec::new();
        if inside(at) {
            classes.push("in");
        }
        if is_special(piece) {
            classes.push("special");
        }
        let id = prompt.tokens.get(at).map_or(String::new(), |id| format!(", id {id}"));
        boxes += &format!(
            "<span class=\"{}\" title=\"token {at}{id}\">{}</span>",
            classes.join(" "),
            visible(piece)
        );
        if piece.ends_with(['\n', 'Ċ']) {
            boxes += "<br>";
        }
        boxes.push('\n');
    }
    let reply = if to.is_none() { "in" } else { "" };
    boxes += &format!("<span class=\"{reply}\"><b>the reply</b></span>");
    let what = if prompt.probe.is_some() { "looked at" } else { "injected" };
    let after = prompt.after.map_or(String::new(), |(from, to)| {
        let to = to.map_or("the end of the reply".to_owned(), |to| format!("token {to}"));
        format!(" (condition after: from token {from} to {to})")
    });
    let caption = paragraph(&format!("{length} tokens; {what} from token {from} to {end}{after}."));
    format!(
        "<h3>Prompt “{}”</h3>\n{caption}<div class=\"strip\">{boxes}</div>\n",
        escape(&prompt.name)
    )
}

/// `<|im_start|>`, `<s>` and the like.
fn is_special(piece: &str) -> bool {
    let piece = piece.trim();
    piece.len() > 2 && piece.starts_with('<') && piece.ends_with('>')
}

/// White space as signs, also in the byte-level spelling.
fn visible(piece: &str) -> String {
    let mut out = String::new();
    for c in piece.chars() {
        match c {
            ' ' | 'Ġ' | '▁' => out += "<i>·</i>",
            '\n' | 'Ċ' => out += "<i>⏎</i>",
            '\t' => out += "<i>⇥</i>",
            c => out += &escape(c.encode_utf8(&mut [0; 4])),
        }
    }
    out
}
