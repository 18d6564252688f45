//! The mean of the residual stream at every layer over a file of texts, in a fixed amount of memory, saved as a
//! vector set.
//!
//! ```sh
//! cargo run --release --example stream_captures -- MODEL texts.txt mean.safetensors
//! ```
#![expect(clippy::print_stdout, reason = "a program that prints")]

use inkling::{
    Engine, Error, Model, Request, Result, VectorSet,
    captures::{Item, Values, collect::collect},
    engine::{
        Options,
        resolve::{Resolved, resolve},
        vectors::{Header, VectorFiles},
    },
    request::{Capture, CaptureSite, Sampling, Site},
};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, texts, out] = &arguments[..] else {
        eprintln!("usage: stream_captures MODEL TEXTS OUT");
        std::process::exit(2);
    };
    let model = Model::open(path.as_ref())?;
    let texts = std::fs::read_to_string(texts)?;
    let mut files = VectorFiles::new("");
    let mut items = Vec::new();
    for (line, text) in texts.lines().enumerate().filter(|(_, text)| !text.is_empty()) {
        let Resolved { job, readings, .. } = resolve(&request(line, text), &model, &mut files)?;
        items.push(Item { id: line.to_string(), job, readings });
    }

    // At most 64 MiB of captures are on their way, however many texts there are.
    let options = Options { capture_bytes: Some(64 << 20), ..Options::default() };
    let engine = Engine::start(&model, &options)?;
    let (layers, dim) = (model.config.layers, model.config.dim);
    let mut sums = vec![vec![0.0; dim]; layers];
    let mut tokens = 0;
    let all: Vec<(usize, &Item)> = items.iter().enumerate().collect();
    collect(&engine, &all, |collected| {
        for (sum, values) in sums.iter_mut().zip(&collected.tensors) {
            let Values::Float(rows) = values else { continue };
            for row in rows.chunks_exact(dim) {
                sum.iter_mut().zip(row).for_each(|(sum, &v)| *sum += f64::from(v));
            }
        }
        tokens += collected.outcome.prompt_tokens;
        Ok(())
    })?;
    if tokens == 0 {
        return Err(Error::new("no texts"));
    }

    let mean = |sum: &Vec<f64>| sum.iter().map(|v| (v / tokens as f64) as f32).collect();
    let mut set = VectorSet::new(Header {
        model_hash: Some(model.hash()?),
        site: Some(Site::ResidPost),
        layers: (0..layers).collect(),
        recipe: format!("mean over {tokens} tokens"),
        ..Header::default()
    });
    set.insert("mean", sums.iter().map(mean).collect())?;
    set.save(out.as_ref())?;
    println!("the mean of {tokens} tokens at {layers} layers is in {out}");
    Ok(())
}

fn request(line: usize, text: &str) -> Request {
    Request {
        id: line.to_string(),
        text: Some(text.to_owned()),
        capture: vec![Capture::all(CaptureSite::ResidPost)],
        sampling: Sampling { max_tokens: 0, ..Sampling::default() },
        n: 1,
        ..Request::default()
    }
}
