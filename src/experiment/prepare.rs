//! A protocol made concrete for one model: prompts rendered, words as tokens, depths as layers.

use std::collections::BTreeMap;

use crate::{
    error::{Context, Error, Result},
    experiment::{
        protocol::{Chat, Part, Place, PromptPlan, Protocol},
        results::{ModelRecord, PromptRecord, WordRecord},
        vectors::{ConceptVectors, vector_prompts},
    },
    model::{Model, Tokenizer},
    request::{Message, Request},
};

/// What planning and running need to know of the model: plain data.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// The model.
    pub model: ModelRecord,
    /// By (prompt, word); the word is "" for prompts that are the same for every word.
    pub prompts: BTreeMap<(String, String), PromptRecord>,
    /// The words of all parts.
    pub words: BTreeMap<String, WordTokens>,
    /// The yes variants' tokens.
    pub yes: Vec<u32>,
    /// The no variants' tokens.
    pub no: Vec<u32>,
    /// One for each part of the protocol, uncut.
    pub parts: Vec<PreparedPart>,
    /// The prompts of the concept vectors, in the order of [`Prepared::concepts`].
    pub vector_prompts: Vec<Vec<u32>>,
    /// The prompts of the baseline words.
    pub baseline_prompts: Vec<Vec<u32>>,
}

/// A word as it is read out: lower-cased, after a space. (In `SmolLM2`'s vocabulary this form gives
/// the fewest words of several tokens, and first tokens that differ from word to word.)
#[derive(Clone, Debug, PartialEq)]
pub struct WordTokens {
    /// Token ids of " word".
    pub tokens: Vec<u32>,
    /// The text of the first.
    pub first_piece: String,
}

/// A part's words and places.
#[derive(Clone, Debug, PartialEq)]
pub struct PreparedPart {
    /// The words used.
    pub words: Vec<String>,
    /// The blocks injected at.
    pub places: Vec<Place>,
}

impl Prepared {
    /// All words, sorted: those that have a vector.
    pub fn concepts(&self) -> Vec<String> {
        self.words.keys().cloned().collect()
    }

    /// All blocks injected at, ascending.
    pub fn layers(&self) -> Vec<usize> {
        let places = self.parts.iter().flat_map(|part| &part.places);
        let mut layers: Vec<usize> = places.map(|place| place.layer).collect();
        layers.sort_unstable();
        layers.dedup();
        layers
    }

    /// The words for the manifest.
    pub fn word_records(&self, vectors: &ConceptVectors) -> Vec<WordRecord> {
        let record = |(word, tokens): (&String, &WordTokens)| {
            let norm = |layer: &usize| {
                let vector = vectors.get(word, *layer)?;
                Some((*layer, crate::engine::vectors::norm(vector)))
            };
            WordRecord {
                word: word.clone(),
                tokens: tokens.tokens.len(),
                first_piece: tokens.first_piece.clone(),
                norms: vectors.layers.iter().filter_map(norm).collect(),
            }
        };
        self.words.iter().map(record).collect()
    }

    /// The prompts for the manifest.
    pub fn prompt_records(&self) -> Vec<PromptRecord> {
        self.prompts.values().cloned().collect()
    }
}

/// Renders and checks everything that can be known before the first trial.
pub fn prepare(model: &Model, protocol: &Protocol) -> Result<Prepared> {
    let tokenizer = model.tokenizer.as_deref().ok_or_else(|| {
        Error::new("the model has no tokenizer").at(model.name.clone()).hint("trials need text")
    })?;
    let mut words = BTreeMap::new();
    let mut parts = Vec::new();
    for part in &protocol.parts {
        let prepared = prepare_part(part, tokenizer, model.config.layers)
            .at(|| format!("part {:?}", part.name))?;
        for word in &prepared.words {
            words.insert(word.clone(), word_tokens(tokenizer, word)?);
        }
        parts.push(prepared);
    }
    let mut prompts = BTreeMap::new();
    for (part, prepared) in protocol.parts.iter().zip(&parts) {
        for name in &part.prompts {
            let plan = &protocol.prompts[name];
            let of_words =
                if plan.uses_word() { prepared.words.clone() } else { vec![String::new()] };
            for word in of_words {
                let record = render(model, &protocol.chat, name, plan, &word)
                    .at(|| format!("prompts.{name}"))?;
                prompts.insert((name.clone(), word), record);
            }
        }
    }
    let (yes, no) = answers(tokenizer, protocol)?;
    let recipe = &protocol.vectors;
    let names: Vec<String> = words.keys().cloned().collect();
    Ok(Prepared {
        model: record(model)?,
        prompts,
        yes,
        no,
        parts,
        vector_prompts: vector_prompts(model, &protocol.chat, &recipe.template, &names)?,
        baseline_prompts: vector_prompts(
            model,
            &protocol.chat,
            &recipe.template,
            &recipe.baseline,
        )?,
        words,
    })
}

fn record(model: &Model) -> Result<ModelRecord> {
    Ok(ModelRecord {
        name: model.name.clone(),
        hash: model.hash()?,
        architecture: model.config.architecture.clone(),
        layers: model.config.layers,
        dim: model.config.dim,
        parameters: model.config.parameters(),
    })
}

fn prepare_part(part: &Part, tokenizer: &Tokenizer, layers: usize) -> Result<PreparedPart> {
    let mut words = Vec::new();
    for word in &part.words {
        if !part.single_token || word_tokens(tokenizer, word)?.tokens.len() == 1 {
            words.push(word.clone());
        }
    }
    let wanted = part.count.unwrap_or(words.len());
    if words.is_empty() || words.len() < wanted {
        return Err(Error::new("the list has too few words")
            .expected(wanted.max(1))
            .got(words.len())
            .hint("single_token keeps words that are one token of the model, lower-cased after a space"));
    }
    words.truncate(wanted);
    Ok(PreparedPart { words, places: part.places.resolve(layers)? })
}

fn word_tokens(tokenizer: &Tokenizer, word: &str) -> Result<WordTokens> {
    let tokens = tokenizer.encode(&format!(" {}", word.to_lowercase()), false)?.tokens;
    let first = *tokens.first().ok_or_else(|| {
        Error::new("the word has no tokens in the model's vocabulary").at(format!("{word:?}"))
    })?;
    Ok(WordTokens { first_piece: tokenizer.piece(first), tokens })
}

/// The variants that are one token. A token of both answers would say nothing.
fn answers(tokenizer: &Tokenizer, protocol: &Protocol) -> Result<(Vec<u32>, Vec<u32>)> {
    let single = |variants: &[String], name: &str| -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for variant in variants {
            let tokens = tokenizer.encode(variant, false)?.tokens;
            if let [token] = tokens[..]
                && !ids.contains(&token)
            {
                ids.push(token);
            }
        }
        if ids.is_empty() {
            return Err(Error::new("none of the answer's variants is one token of the model")
                .at(format!("answers.{name}"))
                .got(format!("{variants:?}")));
        }
        Ok(ids)
    };
    let yes = single(&protocol.answers.yes, "yes")?;
    let no = single(&protocol.answers.no, "no")?;
    if yes.iter().any(|token| no.contains(token)) {
        return Err(Error::new("yes and no share a token").at("answers"));
    }
    Ok((yes, no))
}

fn render(
    model: &Model,
    chat: &Chat,
    name: &str,
    plan: &PromptPlan,
    word: &str,
) -> Result<PromptRecord> {
    let fill = |text: &str| fill(text, plan.trial, word);
    let turn = |turn: &Message| Message { role: turn.role.clone(), content: fill(&turn.content) };
    let request = Request {
        messages: Some(plan.turns.iter().map(turn).collect()),
        system: chat.system.clone(),
        thinking: chat.thinking,
        date: chat.date.clone(),
        prefill: plan.prefill.as_deref().map(fill),
        ..Request::default()
    };
    let prompt = model.render(&request)?;
    let window = plan.window.map_texts(fill);
    let (from, to) =
        prompt.window(window.from.as_ref(), window.to.as_ref()).at(|| "window".into())?;
    Ok(PromptRecord {
        name: if word.is_empty() { name.to_owned() } else { format!("{name} ({word})") },
        text: prompt.text,
        tokens: prompt.tokens,
        pieces: prompt.pieces,
        from,
        to,
    })
}

fn fill(text: &str, trial: u32, word: &str) -> String {
    text.replace("{trial}", &trial.to_string()).replace("{word}", &word.to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        experiment::protocol::Window,
        request::{Marker, Position, Span, Turn},
    };

    #[test]
    fn placeholders_are_filled_in_texts_and_windows() {
        assert_eq!(fill("Trial {trial}: {word}, {word}", 3, "Bread"), "Trial 3: bread, bread");
        let span = |text: &str| Span {
            text: text.into(),
            turn: Some(Turn::Role("user.last".into())),
            nth: None,
        };
        let marker = |text: &str| Some(Position::Marker(Marker::StartOf(span(text))));
        let window = Window { from: marker("\n\nTrial {trial}"), to: Some(Position::Index(-1)) };
        let filled = window.map_texts(|text| fill(text, 2, ""));
        assert_eq!(filled.from, marker("\n\nTrial 2"));
        assert_eq!(filled.to, Some(Position::Index(-1)));
    }
}
