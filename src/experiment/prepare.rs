//! A protocol made concrete for one model: prompts rendered, words as tokens, depths as layers.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
};

use crate::{
    engine::resolve::captures_of,
    error::{Context, Error, Result},
    experiment::{
        protocol::{Chat, Part, Place, PromptPlan, Protocol, Window},
        results::{ModelRecord, PromptRecord, WordRecord},
        vectors::{ConceptVectors, Inputs},
    },
    model::{Model, ModelConfig, Tokenizer},
    request::{Message, Request},
};

/// What planning and running need to know of the model: plain data.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The model.
    pub model: ModelRecord,
    /// For tokens' texts; none in tests without a model.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// As rendered.
    pub prompts: BTreeMap<PromptKey, PromptRecord>,
    /// The words of all parts.
    pub words: BTreeMap<String, WordTokens>,
    /// Sizes and constants of the model; none in tests without one.
    pub config: Option<ModelConfig>,
    /// The yes variants' tokens.
    pub yes: Vec<u32>,
    /// The no variants' tokens.
    pub no: Vec<u32>,
    /// One for each part of the protocol, uncut.
    pub parts: Vec<PreparedPart>,
    /// Words that have vectors only to compare with, sorted.
    pub band: Vec<String>,
    /// What the vectors of [`Prepared::vector_words`] are made from.
    pub inputs: Inputs,
}

/// A prompt's name, and the word and the sentence that its texts hold ("" where they hold none).
pub type PromptKey = (String, String, String);

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
    /// The sentence of each word; empty in parts without.
    pub sentences: Vec<String>,
    /// The blocks injected at.
    pub places: Vec<Place>,
}

impl Prepared {
    /// The words that have a vector: those of the parts, sorted, and those to compare with.
    pub fn vector_words(&self) -> Vec<String> {
        self.words.keys().chain(&self.band).cloned().collect()
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
            for index in 0..prepared.words.len() {
                let of = |list: &[String], used: bool| {
                    list.get(index).filter(|_| used).cloned().unwrap_or_default()
                };
                let word = of(&prepared.words, plan.uses_word());
                let sentence = of(&prepared.sentences, plan.uses_sentence());
                let key = (name.clone(), word, sentence);
                let record = match prompts.entry(key) {
                    Entry::Occupied(entry) => entry.into_mut(),
                    Entry::Vacant(entry) => {
                        let record = render(model, &protocol.chat, entry.key(), plan)
                            .at(|| format!("prompts.{name}"))?;
                        entry.insert(record)
                    }
                };
                captures_of(&part.capture, record.tokens.len(), &model.config)
                    .at(|| format!("part {:?}, prompt {name:?}", part.name))?;
            }
        }
    }
    let (yes, no) = answers(tokenizer, protocol)?;
    let mut band: Vec<String> = protocol.parts.iter().flat_map(|part| part.band.clone()).collect();
    band.sort_unstable();
    band.dedup();
    band.retain(|word| !words.contains_key(word));
    let names: Vec<String> = words.keys().chain(&band).cloned().collect();
    Ok(Prepared {
        model: record(model)?,
        tokenizer: model.tokenizer.clone(),
        prompts,
        config: Some(model.config.clone()),
        yes,
        no,
        parts,
        band,
        inputs: Inputs::new(model, &protocol.chat, &protocol.vectors, &names)?,
        words,
    })
}

fn record(model: &Model) -> Result<ModelRecord> {
    Ok(ModelRecord {
        name: model.name.clone(),
        commit: model.commit.clone(),
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
    let sentences = part.sentences.iter().cycle().take(words.len()).cloned().collect();
    Ok(PreparedPart { words, sentences, places: part.places.resolve(layers)? })
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
    (name, word, sentence): &PromptKey,
    plan: &PromptPlan,
) -> Result<PromptRecord> {
    let fill = |text: &str| fill(text, plan.trial, word, sentence);
    let turn = |turn: &Message| Message { role: turn.role.clone(), content: fill(&turn.content) };
    // The answer's beginning is a turn that is continued, so that the template puts before it what it puts
    // before every answer (a blank, an empty thought).
    let begun = plan.prefill.as_deref().filter(|text| !text.is_empty());
    let begun = begun.map(|text| Message { role: "assistant".into(), content: fill(text) });
    let request = Request {
        messages: Some(plan.turns.iter().map(turn).chain(begun).collect()),
        system: chat.system.clone(),
        thinking: chat.thinking,
        date: chat.date.clone(),
        ..Request::default()
    };
    let prompt = model.render(&request)?;
    let resolve = |window: &Window, name: &str| {
        let window = window.map_texts(fill);
        let range = prompt.range(window.from.as_ref(), window.to.as_ref());
        range.map(|range| (range.from, range.to)).at(|| name.to_owned())
    };
    let (from, to) = resolve(&plan.window, "window")?;
    let after = plan.after.as_ref().map(|window| resolve(window, "after")).transpose()?;
    let probe = plan.probe.as_ref().map(|window| resolve(window, "probe")).transpose()?;
    // A probe sees nothing but the prompt.
    let probe = probe.map(|(from, to)| (from, to.unwrap_or(prompt.tokens.len())));
    let parts = [word, sentence].map(String::as_str).into_iter().filter(|text| !text.is_empty());
    let parts = parts.collect::<Vec<_>>().join(" | ");
    Ok(PromptRecord {
        name: if parts.is_empty() { name.clone() } else { format!("{name} ({parts})") },
        text: prompt.text,
        tokens: prompt.tokens,
        pieces: prompt.pieces,
        from,
        to,
        after,
        probe,
    })
}

/// A text with its placeholders filled.
pub(super) fn fill(text: &str, trial: u32, word: &str, sentence: &str) -> String {
    let text = text.replace("{trial}", &trial.to_string());
    text.replace("{word}", &word.to_lowercase()).replace("{sentence}", sentence)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{Marker, Position, Span, Turn};

    #[test]
    fn placeholders_are_filled_in_texts_and_windows() {
        let filled = fill("Trial {trial}: {word}, {word}. {sentence}", 3, "Bread", "It rains.");
        assert_eq!(filled, "Trial 3: bread, bread. It rains.");
        let span = |text: &str| Span {
            text: text.into(),
            turn: Some(Turn::Role("user.last".into())),
            nth: None,
        };
        let marker = |text: &str| Some(Position::Marker(Marker::StartOf(span(text))));
        let window = Window { from: marker("\n\nTrial {trial}"), to: Some(Position::Index(-1)) };
        let filled = window.map_texts(|text| fill(text, 2, "", ""));
        assert_eq!(filled.from, marker("\n\nTrial 2"));
        assert_eq!(filled.to, Some(Position::Index(-1)));
    }
}
