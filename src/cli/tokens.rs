//! `inkling tokens`: the rendered prompt, and where injections act in it.

use std::process::ExitCode;

use serde::Serialize;

use super::{
    args::ModelArgs,
    output::{Output, columns},
    requests::RequestArgs,
};
use crate::{
    error::{Context, Result},
    model::{Model, Prompt, TokenWindow},
    request::Request,
};

/// Show prompts as the model sees them, one token a line, with the windows of their injections
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    requests: RequestArgs,
    /// One JSON object a request
    #[arg(long)]
    json: bool,
}

/// A prompt, its tokens and its windows.
#[derive(Serialize)]
struct Shown<'a> {
    id: &'a str,
    text: &'a str,
    tokens: Vec<Token<'a>>,
    windows: Vec<Window>,
}

/// Of one of the request's injections.
#[derive(Serialize)]
struct Window {
    inject: usize,
    #[serde(flatten)]
    tokens: TokenWindow,
}

#[derive(Serialize)]
struct Token<'a> {
    index: usize,
    id: u32,
    piece: &'a str,
    /// The injections that act on it.
    inject: Vec<usize>,
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let requests = args.requests.load()?;
    let model = args.model.open()?;
    let render = |(index, request)| rendered(request, &model).at(|| requests.place(index));
    let prompts: Vec<_> = requests.list.iter().enumerate().map(render).collect::<Result<_>>()?;
    let mut output = Output::new();
    for (request, (prompt, windows)) in requests.list.iter().zip(prompts) {
        let shown = shown(&request.id, &prompt, windows);
        if args.json {
            output.line(serde_json::to_string(&shown)?)?;
        } else {
            lines(&shown).iter().try_for_each(|line| output.line(line))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn rendered(request: &Request, model: &Model) -> Result<(Prompt, Vec<Window>)> {
    let prompt = model.render(request)?;
    let mut windows = Vec::new();
    for (i, injection) in request.inject.iter().enumerate() {
        let found = prompt.windows(injection).at(|| format!("inject[{i}]"))?;
        windows.extend(found.into_iter().map(|tokens| Window { inject: i, tokens }));
    }
    Ok((prompt, windows))
}

fn shown<'a>(id: &'a str, prompt: &'a Prompt, windows: Vec<Window>) -> Shown<'a> {
    let acting = |position: usize| {
        let acting = windows.iter().filter(|window| window.tokens.holds(position));
        acting.map(|window| window.inject).collect()
    };
    let token = |(index, (id, piece)): (usize, (&u32, &'a String))| Token {
        index,
        id: *id,
        piece,
        inject: acting(index),
    };
    let tokens = prompt.tokens.iter().zip(&prompt.pieces).enumerate().map(token).collect();
    Shown { id, text: &prompt.text, tokens, windows }
}

/// For people: a header, then one token a line.
fn lines(shown: &Shown) -> Vec<String> {
    let marks = |acting: &[usize]| {
        let marks: Vec<String> = acting.iter().map(|i| format!("inject[{i}]")).collect();
        marks.join(" ")
    };
    let mut rows: Vec<Vec<String>> = Vec::new();
    for token in &shown.tokens {
        let piece = format!("{:?}", token.piece);
        rows.push(vec![token.index.to_string(), token.id.to_string(), piece, marks(&token.inject)]);
    }
    let end = shown.tokens.len();
    let after = shown.windows.iter().filter(|window| window.tokens.to.is_none_or(|to| to > end));
    let after: Vec<usize> = after.map(|window| window.inject).collect();
    if !after.is_empty() {
        rows.push(vec![format!("{end}.."), String::new(), "(generated)".into(), marks(&after)]);
    }
    let mut lines = vec![format!("{}: {end} tokens", shown.id)];
    lines.extend(columns(&rows, &[true, true, false, false]));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_marked_token_by_token() {
        let token = |index: usize, piece: &'static str, inject: &[usize]| Token {
            index,
            id: 10 + index as u32,
            piece,
            inject: inject.to_vec(),
        };
        let window = |inject, to| Window { inject, tokens: TokenWindow { from: 1, to, every: 1 } };
        let shown = Shown {
            id: "a",
            text: "Hi\n!",
            tokens: vec![token(0, "Hi", &[]), token(1, "\n", &[0, 1]), token(2, "!", &[1])],
            windows: vec![window(0, Some(2)), window(1, None)],
        };
        let want = [
            "a: 3 tokens",
            "  0  10  \"Hi\"",
            "  1  11  \"\\n\"         inject[0] inject[1]",
            "  2  12  \"!\"          inject[1]",
            "3..      (generated)  inject[1]",
        ];
        assert_eq!(lines(&shown), want);
        assert!(shown.windows[1].tokens.holds(9) && !shown.windows[0].tokens.holds(2));
    }
}
