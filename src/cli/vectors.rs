//! `inkling vectors`: concept vectors for words, as a vector set.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde::Serialize;

use super::{
    args::{EngineArgs, ModelArgs},
    output::{Output, columns, note},
    progress::Bar,
};
use crate::{
    engine::vectors::norm,
    error::{Error, Result},
    experiment::{
        protocol::{Chat, Protocol},
        vectors::{Extraction, concept_vectors},
        words,
    },
    files,
    model::Model,
};

/// Make concept vectors for words
#[derive(clap::Args)]
pub struct Args {
    /// The words
    #[arg(value_name = "WORD", required_unless_present = "words")]
    word: Vec<String>,
    /// More words: a file with one a line, or builtin:concepts
    #[arg(long, value_name = "LIST")]
    words: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// Only these blocks, e.g. 12,20,24 [default: all]
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    layers: Vec<usize>,
    /// What is said about a word, with {word} in it [default: as in injected-thoughts]
    #[arg(long, value_name = "TEXT")]
    template: Option<String>,
    /// Words whose mean is subtracted [default: builtin:baseline]
    #[arg(long, value_name = "LIST")]
    baseline: Option<String>,
    /// The vector set (safetensors)
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A word and its vectors.
#[derive(Serialize)]
struct Row {
    word: String,
    /// The tokens of " word".
    tokens: Vec<String>,
    layers: Vec<AtLayer>,
}

#[derive(Serialize)]
struct AtLayer {
    layer: usize,
    /// ‖v‖.
    norm: f32,
    /// ‖v‖ / mean ‖h‖ of the baseline prompts' last tokens.
    against_stream: f64,
    /// Cosine of the vectors over the two halves of the baseline.
    split_half: f64,
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let recipe = Protocol::builtin("injected-thoughts")?.vectors;
    let template = args.template.as_ref().unwrap_or(&recipe.template);
    if !template.contains("{word}") {
        return Err(Error::new("the template has no place for the word")
            .at("--template")
            .expected("a text with {word} in it")
            .got(format!("{template:?}"))
            .into());
    }
    let words = word_list(args)?;
    let baseline = match &args.baseline {
        Some(list) => words::load(list, Path::new(""))?,
        None => recipe.baseline,
    };
    let model = args.model.open()?;
    let layers = layers(&args.layers, model.config.layers)?;
    files::check_writable(&args.out)?;
    let engine = args.engine.start(&model)?;
    let mut bar = Bar::default();
    let extraction = concept_vectors(
        &engine,
        &model,
        &Chat::default(),
        template,
        &words,
        &baseline,
        &layers,
        &mut bar,
    )?;
    drop(bar);
    let recipe = format!("mean-difference of {template:?} over {} baseline words", baseline.len());
    extraction.vectors.to_set(&model.hash()?, &recipe)?.save(&args.out)?;
    let rows = rows(&extraction, &model)?;
    let mut output = Output::new();
    if args.json {
        output.json(&rows)?;
    } else {
        lines(&rows, model.config.layers).iter().try_for_each(|line| output.line(line))?;
        note(format!("{} vectors in {}", rows.len(), args.out.display()));
    }
    for row in rows.iter().filter(|row| row.tokens.len() > 1) {
        note(format!(
            "{:?} is {} tokens: a late vector names only the first, {:?}",
            row.word,
            row.tokens.len(),
            row.tokens[0]
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// The words of the command line and of the list, each once.
fn word_list(args: &Args) -> Result<Vec<String>> {
    let mut list = args.word.clone();
    if let Some(words) = &args.words {
        list.extend(words::load(words, Path::new(""))?);
    }
    let mut seen = Vec::new();
    for word in list {
        if word.trim().is_empty() || word.contains('#') {
            return Err(Error::new("not a word").got(format!("{word:?}")));
        }
        if !seen.contains(&word) {
            seen.push(word);
        }
    }
    Ok(seen)
}

/// Ascending; all where none is named.
fn layers(wanted: &[usize], all: usize) -> Result<Vec<usize>> {
    if wanted.is_empty() {
        return Ok((0..all).collect());
    }
    if let Some(layer) = wanted.iter().find(|layer| **layer >= all) {
        return Err(Error::new("layer out of range")
            .at("--layers")
            .expected(format!("0..={} (the model has {all} blocks)", all - 1))
            .got(layer)
            .hint("layers are counted from 0"));
    }
    let mut layers = wanted.to_vec();
    layers.sort_unstable();
    layers.dedup();
    Ok(layers)
}

fn rows(extraction: &Extraction, model: &Model) -> Result<Vec<Row>> {
    let vectors = &extraction.vectors;
    let mut rows = Vec::new();
    for (index, word) in vectors.words.iter().enumerate() {
        let of_word = &extraction.split_half[index * vectors.layers.len()..];
        let at = |(i, layer): (usize, &usize)| {
            let norm = vectors.get(word, *layer).map_or(0.0, norm);
            AtLayer {
                layer: *layer,
                norm,
                against_stream: f64::from(norm) / extraction.stream_norms[i],
                split_half: of_word[i],
            }
        };
        let layers = vectors.layers.iter().enumerate().map(at).collect();
        rows.push(Row { word: word.clone(), tokens: word_pieces(model, word)?, layers });
    }
    Ok(rows)
}

/// The tokens of the word as it is read out: lower-cased, after a space.
pub fn word_pieces(model: &Model, word: &str) -> Result<Vec<String>> {
    let Some(tokenizer) = &model.tokenizer else {
        return Err(Error::new("the model has no tokenizer").at(model.name.clone()));
    };
    let tokens = tokenizer.encode(&format!(" {}", word.to_lowercase()), false)?.tokens;
    Ok(tokens.iter().map(|token| tokenizer.piece(*token)).collect())
}

/// One line a word, at the layer nearest to two thirds of the depth.
fn lines(rows: &[Row], blocks: usize) -> Vec<String> {
    let head = ["word", "layer", "norm", "norm/stream", "split-half", "tokens"];
    let mut table = vec![head.map(str::to_owned).to_vec()];
    for row in rows {
        let distance = |at: &&AtLayer| (3 * at.layer).abs_diff(2 * blocks);
        let Some(at) = row.layers.iter().min_by_key(distance) else { continue };
        table.push(vec![
            row.word.clone(),
            at.layer.to_string(),
            format!("{:.1}", at.norm),
            format!("{:.3}", at.against_stream),
            format!("{:.3}", at.split_half),
            format!("{:?}", row.tokens),
        ]);
    }
    columns(&table, &[false, true, true, true, true, false])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_sorted_and_checked() {
        assert_eq!(layers(&[], 3).unwrap(), [0, 1, 2]);
        assert_eq!(layers(&[2, 0, 2], 3).unwrap(), [0, 2]);
        let error = layers(&[3], 3).unwrap_err().to_string();
        assert!(error.contains("--layers") && error.contains("0..=2"), "{error}");
    }

    #[test]
    fn the_table_shows_two_thirds_of_the_depth() {
        let at = |layer| AtLayer { layer, norm: 5.0, against_stream: 0.5, split_half: 0.9 };
        let row = Row {
            word: "sea".into(),
            tokens: vec![" sea".into()],
            layers: (0..30).map(at).collect(),
        };
        let lines = lines(&[row], 30);
        assert_eq!(lines[0], "word  layer  norm  norm/stream  split-half  tokens");
        assert_eq!(lines[1], "sea      20   5.0        0.500       0.900  [\" sea\"]");
    }
}
