//! Every layer against several strengths, on one prompt: by how much does the injected word's own
//! log-probability grow?
//!
//! ```sh
//! inkling vectors ocean --model MODEL --out words.safetensors
//! cargo run --release --example sweep_grid -- MODEL words.safetensors ocean "What is on your mind?"
//! ```
#![expect(clippy::print_stdout, reason = "a program that prints")]

use inkling::{
    Engine, Error, Injection, Model, Request, Result,
    engine::{Job, Options, resolve::resolve, vectors::VectorFiles},
    request::{Message, Position, Sampling, StrengthMode, VectorRef},
};

const DOSES: [f32; 5] = [0.0, 0.125, 0.25, 0.5, 1.0];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, file, word, prompt] = &arguments[..] else {
        eprintln!("usage: sweep_grid MODEL FILE WORD PROMPT");
        std::process::exit(2);
    };
    let model = Model::open(path.as_ref())?;
    let tokenizer = model.tokenizer.as_ref().ok_or_else(|| Error::new("no tokenizer"))?;
    let token = tokenizer.encode(&format!(" {word}"), false)?.tokens[0];
    let mut files = VectorFiles::new("");
    let layers = files.get(file)?.header.layers.clone();

    // Everything is checked before the weights are loaded.
    let mut jobs = Vec::new();
    for &layer in &layers {
        for dose in DOSES {
            let request = request(&format!("{file}#{word}"), layer, dose, prompt);
            let (_, job) = resolve(&request, &model, &mut files)?.alone()?;
            jobs.push(Job { watch: vec![token], ..job });
        }
    }
    let engine = Engine::start(&model, &Options::default())?;
    let mut gains = vec![0.0; jobs.len()];
    engine.run_all(jobs, |at, finished| {
        let first = finished?.outcome.first.ok_or_else(|| Error::new("no logits"))?;
        gains[at] = first.watch[0] - first.logsumexp;
        Ok(())
    })?;

    let cells =
        |row: &[f32]| row.iter().map(|cell| format!("{cell:>8.3}")).collect::<Vec<_>>().join(" ");
    println!("layer  log p({word:?}) at dose 0, then its growth");
    println!("       {}", cells(&DOSES));
    for (layer, row) in layers.iter().zip(gains.chunks_exact(DOSES.len())) {
        let growth: Vec<f32> =
            row.iter().enumerate().map(|(at, v)| if at == 0 { *v } else { v - row[0] }).collect();
        println!("{layer:>5}  {}", cells(&growth));
    }
    println!("{} rows x blocks were shared", engine.stats().layer_rows_saved());
    Ok(())
}

fn request(vector: &str, layer: usize, dose: f32, prompt: &str) -> Request {
    let injection = Injection {
        strength_mode: StrengthMode::Reference,
        from: Some(Position::Index(1)),
        ..Injection::add(VectorRef::Named(vector.to_owned()), layer, dose)
    };
    Request {
        id: format!("{layer} {dose}"),
        messages: Some(vec![Message { role: "user".into(), content: prompt.to_owned() }]),
        inject: vec![injection],
        sampling: Sampling { max_tokens: 0, ..Sampling::default() },
        n: 1,
        ..Request::default()
    }
}
