//! `inkling lens`: the tokens that vectors point at.

use std::{path::PathBuf, process::ExitCode};

use serde::Serialize;

use super::{
    args::ModelArgs,
    output::{Output, columns},
};
use crate::{
    engine::vectors::{VectorSet, norm},
    error::{Context, Error, Result},
    experiment::lens::lens,
    model::Model,
};

/// Show the tokens that the vectors of a set point at (logit lens)
#[derive(clap::Args)]
pub struct Args {
    /// A vector set, or one vector of it as FILE#NAME: safetensors, .npy or a GGUF control vector
    vectors: String,
    #[command(flatten)]
    model: ModelArgs,
    /// Only these layers of the vectors, e.g. 12,20 [default: all]
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    layers: Vec<usize>,
    /// So many tokens a vector
    #[arg(long, value_name = "N", default_value_t = 8)]
    top: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row {
    vector: String,
    /// None: any.
    layer: Option<usize>,
    norm: f32,
    tokens: Vec<Token>,
}

/// A token and its logit.
#[derive(Serialize)]
pub struct Token {
    id: u32,
    /// Its text.
    pub piece: String,
    logit: f32,
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let model = args.model.open()?;
    let (file, name) = match args.vectors.split_once('#') {
        Some((file, name)) => (file, Some(name)),
        None => (args.vectors.as_str(), None),
    };
    let set = VectorSet::load(&PathBuf::from(file))?;
    let dim = set.dim().unwrap_or(0);
    if dim != model.config.dim {
        return Err(Error::new("the vectors are of another width than the model")
            .at(file)
            .expected(model.config.dim)
            .got(dim)
            .into());
    }
    let names: Vec<String> = match name {
        Some(name) => vec![name.to_owned()],
        None => set.names().map(str::to_owned).collect(),
    };
    let mut rows = Vec::new();
    for name in names {
        for layer in layers(&set, &name, &args.layers)? {
            let vector = set.get(&name, layer).at(|| file.to_owned())?;
            rows.push((name.clone(), layer, vector));
        }
    }
    let vectors: Vec<&[f32]> = rows.iter().map(|(.., vector)| &**vector).collect();
    let tokens = tokens(&model, &vectors, args.top)?;
    let rows: Vec<Row> = rows
        .iter()
        .zip(tokens)
        .map(|((name, layer, vector), tokens)| Row {
            vector: name.clone(),
            layer: *layer,
            norm: norm(vector),
            tokens,
        })
        .collect();
    let mut output = Output::new();
    if args.json {
        output.json(&rows)?;
    } else {
        lines(&rows).iter().try_for_each(|line| output.line(line))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The layers of a vector that are to be shown; none stands for the only one of unknown layer.
fn layers(set: &VectorSet, name: &str, wanted: &[usize]) -> Result<Vec<Option<usize>>> {
    if !wanted.is_empty() {
        return Ok(wanted.iter().map(|layer| Some(*layer)).collect());
    }
    let known = set.header.layers.iter().map(|layer| Some(*layer)).collect::<Vec<_>>();
    Ok(match set.unnamed_layers(name)? {
        _ if !known.is_empty() => known,
        Some(count) => (0..count).map(Some).collect(),
        None => vec![None],
    })
}

/// The likeliest tokens of each vector, with their texts where the model has a tokenizer.
pub fn tokens(model: &Model, vectors: &[&[f32]], top: usize) -> Result<Vec<Vec<Token>>> {
    let piece = |id| model.tokenizer.as_ref().map_or_else(String::new, |t| t.piece(id));
    let token = |(id, logit)| Token { id, piece: piece(id), logit };
    let all = lens(model, vectors, top)?;
    Ok(all.into_iter().map(|best| best.into_iter().map(token).collect()).collect())
}

fn lines(rows: &[Row]) -> Vec<String> {
    let head = ["vector", "layer", "norm", "tokens"];
    let mut table = vec![head.map(str::to_owned).to_vec()];
    for row in rows {
        let tokens = row.tokens.iter().map(|t| format!("{:?} {:.1}", t.piece, t.logit));
        table.push(vec![
            row.vector.clone(),
            row.layer.map_or("any".into(), |layer| layer.to_string()),
            format!("{:.1}", row.norm),
            tokens.collect::<Vec<_>>().join(", "),
        ]);
    }
    columns(&table, &[false, true, true, false])
}
