//! `inkling vectors`: concept vectors for words, as a vector set.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde::Serialize;

use super::{
    args::{self, EngineArgs, ModelArgs},
    lens::{Token, tokens},
    output::{Output, columns, note},
    progress::Bar,
};
use crate::{
    engine::{
        point,
        vectors::{Header, VectorSet, norm},
    },
    error::{Context, Error, Result},
    experiment::{
        protocol::{Chat, Protocol, Recipe, VectorRecipe},
        vectors::{Extraction, Inputs, extract},
        words,
    },
    files,
    model::Model,
    request::Site,
};

/// Make concept vectors for words, or a vector set of another program's files
#[derive(clap::Args)]
pub struct Args {
    /// The words
    #[arg(value_name = "WORD", required_unless_present_any = ["words", "import"])]
    word: Vec<String>,
    /// Take these vectors instead of making some: safetensors, .npy or GGUF, where --layers says which block
    /// each of their rows is of, or a folder with a sparse autoencoder of `SAELens`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["word", "words", "recipe"])]
    import: Vec<PathBuf>,
    /// With a sparse autoencoder: the features whose decoder rows are taken, e.g. 12,4096
    #[arg(long, value_name = "FEATURES", value_delimiter = ',', requires = "import")]
    features: Vec<usize>,
    /// More words: a file with one a line, or builtin:concepts
    #[arg(long, value_name = "LIST")]
    words: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// How: mean-difference, single, contrast, pca, embedding or unembedding
    #[arg(long, value_name = "RECIPE", default_value = "mean-difference", value_parser = recipe)]
    recipe: Recipe,
    /// Where in a block, as in requests: `resid_pre`, `resid_mid`, `resid_post`, `attn_out` or `mlp_out`
    #[arg(long, value_name = "SITE", default_value = "resid_post", value_parser = site)]
    site: Site,
    /// For contrast and pca: what the user says with the concept ({word} in it) and without; may be repeated
    #[arg(long, num_args = 2, value_names = ["WITH", "WITHOUT"])]
    pair: Vec<String>,
    /// Project the vectors of these words out, as in bread,milk
    #[arg(long, value_name = "WORDS", value_delimiter = ',')]
    orthogonal_to: Vec<String>,
    /// Only these blocks, e.g. 12,20,24 [default: all]
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    layers: Vec<usize>,
    /// What is said about a word, with {word} in it [default: as in injected-thoughts]
    #[arg(long, value_name = "TEXT")]
    template: Option<String>,
    /// Words whose mean is subtracted [default: builtin:baseline]
    #[arg(long, value_name = "LIST")]
    baseline: Option<String>,
    /// The vector set (safetensors); of one word also FILE.gguf, a control vector as llama.cpp reads it, or
    /// FILE.npy, (layers, dim)
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
    /// ‖v‖ / mean ‖h‖ of the last tokens that vectors are made of; none where none was read.
    against_stream: Option<f64>,
    /// Cosine of the vectors over the two halves of the baseline, where there is one.
    split_half: Option<f64>,
    /// The likeliest tokens of the vector by the logit lens.
    lens: Vec<Token>,
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let model = args.model.open()?;
    if !args.import.is_empty() {
        import(args, &model)?;
        return Ok(ExitCode::SUCCESS);
    }
    let recipe = args.recipe()?;
    let words = word_list(args)?;
    let layers = layers(&args.layers, model.config.layers)?;
    files::check_writable(&args.out)?;
    let (is_gguf, is_npy) = (has_extension(&args.out, "gguf"), has_extension(&args.out, "npy"));
    if (is_gguf || is_npy) && words.len() > 1 || is_gguf && args.site != Site::ResidPost {
        return Err(Error::new(match is_npy {
            true => "an .npy file is one vector",
            false => "a GGUF control vector is one vector of resid_post",
        })
        .at(args.out.display().to_string())
        .got(format!("{} words", words.len()))
        .hint("--out FILE.safetensors takes all")
        .into());
    }
    let inputs = Inputs::new(&model, &Chat::default(), &recipe, &words)?;
    let engine = args.engine.start(&model)?;
    let mut bar = Bar::default();
    let dim = model.config.dim;
    let extraction = extract(&engine, recipe.recipe, &inputs, &layers, dim, &mut bar)?;
    drop(bar);
    save(&extraction.vectors.to_set(&model.hash()?, &recipe.describe())?, &args.out, &model)?;
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

impl Args {
    /// The recipe with what the protocols take where nothing is said.
    fn recipe(&self) -> Result<VectorRecipe> {
        let default = Protocol::builtin("injected-thoughts")?.vectors;
        let template = self.template.clone().unwrap_or(default.template);
        if !template.contains("{word}") {
            return Err(Error::new("the template has no place for the word")
                .at("--template")
                .expected("a text with {word} in it")
                .got(format!("{template:?}")));
        }
        let pairs: Vec<(String, String)> =
            self.pair.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect();
        if matches!(self.recipe, Recipe::Contrast | Recipe::Pca) == pairs.is_empty() {
            return Err(Error::new("pairs of texts go with the recipes contrast and pca")
                .at("--pair")
                .expected("--pair WITH WITHOUT there, and nowhere else"));
        }
        if let Some((with, _)) = pairs.iter().find(|(with, _)| !with.contains("{word}")) {
            return Err(Error::new("the first text of a pair has no place for the word")
                .at("--pair")
                .got(format!("{with:?}")));
        }
        Ok(VectorRecipe {
            recipe: self.recipe,
            site: self.site,
            template,
            baseline: match &self.baseline {
                Some(list) => words::load(list, Path::new(""))?,
                None => default.baseline,
            },
            pairs,
            orthogonal_to: self.orthogonal_to.clone(),
            file: None,
        })
    }
}

/// By its name in requests; a head's vectors are not made here.
fn site(text: &str) -> std::result::Result<Site, String> {
    let site = args::site(text).ok().filter(|site| *site != Site::HeadOut);
    site.ok_or_else(|| "one of resid_pre, resid_mid, resid_post, attn_out, mlp_out".to_owned())
}

/// By its name in protocols.
fn recipe(text: &str) -> std::result::Result<Recipe, String> {
    let value = serde_json::Value::String(text.to_owned());
    let made = serde_json::from_value(value).ok().filter(|recipe| *recipe != Recipe::File);
    made.ok_or_else(|| {
        "one of mean-difference, single, contrast, pca, embedding, unembedding".to_owned()
    })
}

/// Vectors of other files as one set of this model, each row at the block that `--layers` says.
fn import(args: &Args, model: &Model) -> Result<()> {
    let mut set: Option<VectorSet> = None;
    if !args.features.is_empty() && args.import.iter().all(|path| path.is_file()) {
        return Err(Error::new("features are of a folder with a sparse autoencoder")
            .at("--features")
            .expected("such a folder among what is imported"));
    }
    for path in &args.import {
        let place = || path.display().to_string();
        let from = match path.is_dir() {
            true => sparse_autoencoder(path, &args.features, model).at(place)?,
            false => VectorSet::load(path)?,
        };
        if from.dim() != Some(model.config.dim) {
            return Err(Error::new("the vectors are of another width than the model")
                .at(place())
                .expected(model.config.dim)
                .got(from.dim().unwrap_or(0)));
        }
        let named = (!from.header.layers.is_empty()).then(|| from.header.layers.clone());
        for name in from.names() {
            let rows = from.unnamed_layers(name)?;
            let layers = match (&args.layers[..], &named, rows) {
                ([], Some(layers), _) => layers.clone(),
                ([], None, Some(rows)) => (0..rows).collect(),
                ([], None, None) => {
                    return Err(Error::new("nothing says which block a vector is of")
                        .at(format!("{}#{name}", place()))
                        .hint("say it with --layers"));
                }
                (layers, ..) => layers.to_vec(),
            };
            layers_exist(&layers, model.config.layers)?;
            if layers.windows(2).any(|pair| pair[0] >= pair[1]) {
                return Err(Error::new("the blocks of a vector's rows must ascend")
                    .at(format!("{}#{name}", place()))
                    .got(format!("{layers:?}")));
            }
            let hash = model.hash()?;
            if from.header.model_hash.as_ref().is_some_and(|own| *own != hash) {
                return Err(Error::new("the vectors are of another model").at(place()));
            }
            let site = from.header.site.unwrap_or(args.site);
            let count = named.as_ref().map_or(rows.unwrap_or(1), Vec::len);
            if layers.len() != count {
                return Err(Error::new(
                    "--layers names another number of blocks than there are rows",
                )
                .at(format!("{}#{name}", place()))
                .expected(count)
                .got(layers.len()));
            }
            let row = |at: usize| {
                let own = named.as_ref().map_or(at, |layers| layers[at]);
                from.get(name, (count > 1 || named.is_some()).then_some(own))
                    .map(|row| row.to_vec())
            };
            let rows = (0..count).map(row).collect::<Result<Vec<_>>>().at(place)?;
            let set = set.get_or_insert_with(|| {
                VectorSet::new(Header {
                    model_hash: Some(hash.clone()),
                    site: Some(site),
                    layers: layers.clone(),
                    recipe: match from.header.recipe.is_empty() {
                        true => format!("imported from {}", place()),
                        false => format!("{}, imported from {}", from.header.recipe, place()),
                    },
                    operation: from.header.operation,
                })
            });
            if set.header.site != Some(site) {
                return Err(Error::new("the files' vectors are of different sites").at(place()));
            }
            if set.header.layers != layers {
                return Err(Error::new("the files' vectors are of different blocks")
                    .at(place())
                    .expected(format!("{:?}", set.header.layers))
                    .got(format!("{layers:?}")));
            }
            set.insert(name, rows).at(place)?;
        }
    }
    let set = set.ok_or_else(|| Error::new("there is nothing to import").at("--import"))?;
    save(&set, &args.out, model)?;
    note(format!("{} vectors in {}", set.names().count(), args.out.display()));
    Ok(())
}

/// Decoder rows, which are of the point that the autoencoder was trained on.
fn sparse_autoencoder(dir: &Path, features: &[usize], model: &Model) -> Result<VectorSet> {
    let (mut set, hook) = VectorSet::load_sae(dir, features)?;
    let point = point(&hook, &model.config)?;
    let (site, layer) = point.injected()?;
    if site == Site::HeadOut {
        return Err(Error::new("an autoencoder of all heads together")
            .expected("one of the stream, or of what attention and the MLP add")
            .got(hook));
    }
    note(format!("{hook} is {point}"));
    (set.header.site, set.header.layers) = (Some(site), vec![layer]);
    Ok(set)
}

fn has_extension(path: &Path, wanted: &str) -> bool {
    path.extension().is_some_and(|extension| extension == wanted)
}

/// As a vector set, or where the name ends in .gguf as a control vector, in .npy as an array.
fn save(set: &VectorSet, path: &Path, model: &Model) -> Result<()> {
    if has_extension(path, "npy") {
        return set.save_npy(path);
    }
    if !has_extension(path, "gguf") {
        return set.save(path);
    }
    let left = set.save_control_vector(path, &model.config.architecture)?;
    if !left.is_empty() {
        note(format!("GGUF control vectors begin at block 1: block {left:?} is left out"));
    }
    Ok(())
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
pub fn layers(wanted: &[usize], all: usize) -> Result<Vec<usize>> {
    if wanted.is_empty() {
        return Ok((0..all).collect());
    }
    layers_exist(wanted, all)?;
    let mut layers = wanted.to_vec();
    layers.sort_unstable();
    layers.dedup();
    Ok(layers)
}

fn layers_exist(wanted: &[usize], all: usize) -> Result<()> {
    if let Some(layer) = wanted.iter().find(|layer| **layer >= all) {
        return Err(Error::new("layer out of range")
            .at("--layers")
            .expected(format!("0..={} (the model has {all} blocks)", all - 1))
            .got(layer)
            .hint("layers are counted from 0"));
    }
    Ok(())
}

fn rows(extraction: &Extraction, model: &Model) -> Result<Vec<Row>> {
    let vectors = &extraction.vectors;
    let all: Vec<&[f32]> = vectors
        .words
        .iter()
        .flat_map(|word| vectors.layers.iter().filter_map(|layer| vectors.get(word, *layer)))
        .collect();
    let mut lenses = tokens(model, &all, LENS)?.into_iter();
    let mut rows = Vec::new();
    for (index, word) in vectors.words.iter().enumerate() {
        let at = |(i, layer): (usize, &usize)| {
            let norm = vectors.get(word, *layer).map_or(0.0, norm);
            let stream = extraction.stream_norms.get(i);
            AtLayer {
                layer: *layer,
                norm,
                against_stream: stream.map(|stream| f64::from(norm) / stream),
                split_half: extraction.split_half.get(index * vectors.layers.len() + i).copied(),
                lens: lenses.next().unwrap_or_default(),
            }
        };
        let layers = vectors.layers.iter().enumerate().map(at).collect();
        rows.push(Row { word: word.clone(), tokens: word_pieces(model, word)?, layers });
    }
    Ok(rows)
}

/// Tokens of the logit lens that are shown.
const LENS: usize = 5;

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
    let number =
        |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.3}"));
    let head = ["word", "layer", "norm", "norm/stream", "split-half", "tokens", "logit lens"];
    let mut table = vec![head.map(str::to_owned).to_vec()];
    for row in rows {
        let distance = |at: &&AtLayer| (3 * at.layer).abs_diff(2 * blocks);
        let Some(at) = row.layers.iter().min_by_key(distance) else { continue };
        table.push(vec![
            row.word.clone(),
            at.layer.to_string(),
            format!("{:.1}", at.norm),
            number(at.against_stream),
            number(at.split_half),
            format!("{:?}", row.tokens),
            at.lens.iter().map(|t| format!("{:?}", t.piece)).collect::<Vec<_>>().join(" "),
        ]);
    }
    columns(&table, &[false, true, true, true, true, false, false])
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
        let at = |layer| AtLayer {
            layer,
            norm: 5.0,
            against_stream: Some(0.5),
            split_half: Some(0.9),
            lens: Vec::new(),
        };
        let row = Row {
            word: "sea".into(),
            tokens: vec![" sea".into()],
            layers: (0..30).map(at).collect(),
        };
        let lines = lines(&[row], 30);
        assert_eq!(lines[0], "word  layer  norm  norm/stream  split-half  tokens    logit lens");
        assert_eq!(lines[1], "sea      20   5.0        0.500       0.900  [\" sea\"]");
    }
}
