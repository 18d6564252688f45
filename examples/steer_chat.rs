//! A chat whose replies are steered, and appear word by word.
//!
//! ```sh
//! inkling vectors ocean --model MODEL --out words.safetensors
//! cargo run --release --example steer_chat -- MODEL words.safetensors#ocean 24 0.5
//! ```
//!
//! A line is a message; `/dose 0.25` changes the dose, in units of the stream's mean norm.
#![expect(clippy::print_stdout, reason = "a program that prints")]

use std::{
    io::{BufRead, Write},
    sync::mpsc,
};

use inkling::{
    Engine, Injection, Model, Request, Result,
    engine::{Event, Options, resolve::resolve, vectors::VectorFiles},
    request::{Message, Position, Sampling, StrengthMode, VectorRef},
};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, vector, layer, dose] = &arguments[..] else {
        eprintln!("usage: steer_chat MODEL FILE#NAME LAYER DOSE");
        std::process::exit(2);
    };
    let number = |text: &str| text.parse::<f32>().unwrap_or(0.0);
    let (layer, mut dose) = (number(layer) as usize, number(dose));
    let model = Model::open(path.as_ref())?;
    let engine = Engine::start(&model, &Options { max_batch: 1, ..Options::default() })?;
    let mut files = VectorFiles::new("");
    let mut messages: Vec<Message> = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if let Some(wanted) = line.strip_prefix("/dose ") {
            dose = number(wanted);
            continue;
        }
        messages.push(Message { role: "user".into(), content: line });
        let steering = Injection {
            strength_mode: StrengthMode::Reference,
            // From the last token of the prompt on, so that the norm is known and the first token steered.
            from: Some(Position::Index(-1)),
            ..Injection::add(VectorRef::Named(vector.clone()), layer, dose)
        };
        let request = Request {
            id: "chat".into(),
            messages: Some(messages.clone()),
            inject: if dose == 0.0 { Vec::new() } else { vec![steering] },
            sampling: Sampling { max_tokens: 120, ..Sampling::default() },
            n: 1,
            ..Request::default()
        };
        let (_, job) = resolve(&request, &model, &mut files)?.alone()?;
        let reply = stream(&engine, &model, job)?;
        messages.push(Message { role: "assistant".into(), content: reply });
    }
    Ok(())
}

/// Prints a reply as it comes; gives all of it.
fn stream(engine: &Engine, model: &Model, job: inkling::engine::Job) -> Result<String> {
    let (sender, events) = mpsc::channel();
    engine.submit(job, 1, &sender)?;
    drop(sender); // the engine's is the last one: the loop ends with the job
    let (mut tokens, mut shown) = (Vec::new(), 0);
    for (_, event) in events {
        match event {
            Event::Token { token, .. } => {
                tokens.push(token);
                let text = model.tokenizer.as_ref().map_or_else(String::new, |t| t.decode(&tokens));
                // A character may be several tokens: its first half is shown when it is whole.
                if !text.ends_with('\u{fffd}') {
                    print!("{}", &text[shown..]);
                    std::io::stdout().flush()?;
                    shown = text.len();
                }
            }
            Event::Done(outcome) => {
                let receipt = outcome.receipts.first();
                let change = receipt.and_then(|receipt| receipt.measured);
                println!("\n[changed by {:.1} a row]", change.unwrap_or(0.0));
                return Ok(outcome.samples.into_iter().next().map_or_else(String::new, |s| s.text));
            }
            Event::Failed(error) => return Err(error),
            _ => {}
        }
    }
    Ok(String::new())
}
