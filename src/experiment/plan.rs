//! What the engine is asked for a trial: its seed, its id, its vector, its job.

use std::{collections::HashMap, sync::Arc};

use crate::{
    engine::{Capture, Injection, Job, resolve::captures_of},
    error::{Context, Error, Result},
    experiment::{
        grid::{Cell, Grid},
        prepare::Prepared,
        protocol::{Kind, Part, Protocol},
        protocol_file::check_distinct,
        results::{Condition, PromptRecord, Trial},
        seeds::{self, Identity, InjectionIdentity, SCHEMA},
        vectors::{ConceptVectors, random_vector, shuffled_vector},
    },
    request::{CaptureSite, Op, Sampling},
};

/// A trial that is ready to be run.
#[derive(Clone, Debug)]
pub struct Planned<'a> {
    /// What it is.
    pub cell: Cell<'a>,
    /// Hash of all that its result depends on.
    pub id: String,
    /// Its clean partner's id; none for a clean trial.
    pub clean: Option<String>,
    /// The sampling's seed.
    pub seed: u64,
}

/// The trials of a run, made as they are asked for, and the engine's jobs of them.
pub struct Plan<'a> {
    protocol: &'a Protocol,
    prepared: &'a Prepared,
    grid: Grid<'a>,
    vectors: Vectors<'a>,
    concepts: &'a ConceptVectors,
}

/// By part, word, block, condition and [`draw`]: which other word's vector a word gets is the part's.
type Vectors<'a> = HashMap<(usize, &'a str, usize, Condition, u32), Content>;

/// A vector and its hash.
struct Content {
    vector: Arc<[f32]>,
    hash: String,
}

impl<'a> Plan<'a> {
    /// The vectors of all trials. An error where one is missing, or where two trials would be the same.
    pub fn new(
        protocol: &'a Protocol,
        prepared: &'a Prepared,
        concepts: &'a ConceptVectors,
    ) -> Result<Self> {
        check_all_differ(protocol, prepared)?;
        let vectors = contents(protocol, prepared, concepts)?;
        Ok(Self { protocol, prepared, grid: Grid::new(protocol, prepared), vectors, concepts })
    }

    /// Which trials there are, in the order in which they are run.
    pub fn grid(&self) -> &Grid<'a> {
        &self.grid
    }

    /// The trial at a place of the grid.
    pub fn trial(&self, place: usize) -> Planned<'a> {
        let (id, seed) = self.identity(place);
        let clean = self.grid.clean_of(place).map(|clean| self.identity(clean).0);
        Planned { cell: self.grid.cell(place), id, clean, seed }
    }

    fn identity(&self, place: usize) -> (String, u64) {
        let cell = self.grid.cell(place);
        let seed = seeds::seed(self.protocol.seed, cell.prompt, cell.concept, cell.repeat);
        (self.id(&cell, seed), seed)
    }

    /// The place of a line of this run; none where a run of this plan can't have written it.
    pub fn place_of(&self, line: &Trial) -> Option<usize> {
        self.grid.find(line).filter(|place| self.identity(*place).0 == line.id)
    }

    /// The trials in order.
    #[cfg(test)]
    pub fn trials(&self) -> impl Iterator<Item = Planned<'a>> {
        (0..self.grid.len()).map(|place| self.trial(place))
    }

    /// What each part measures.
    pub fn kinds(&self) -> impl Iterator<Item = Kind> {
        self.protocol.parts.iter().map(|part| part.kind)
    }

    /// The part of a trial.
    pub fn part(&self, trial: &Planned) -> &Part {
        &self.protocol.parts[trial.cell.part]
    }

    /// The words that a readout compares.
    pub fn words(&self, trial: &Planned) -> &[String] {
        &self.prepared.parts[trial.cell.part].words
    }

    /// How many yes and no variants lead the watched tokens; (0, 0) for other questions.
    pub fn answers(&self, trial: &Planned) -> (usize, usize) {
        if self.protocol.prompts[trial.cell.prompt].yes_no {
            (self.prepared.yes.len(), self.prepared.no.len())
        } else {
            (0, 0)
        }
    }

    /// The prompt's tokens.
    pub fn tokens(&self, trial: &Planned) -> &[u32] {
        &self.prompt(&trial.cell).tokens
    }

    /// The vectors that the trials' own are made of, those of control words among them.
    pub fn concepts(&self) -> &ConceptVectors {
        self.concepts
    }

    /// What a trial of kind probe captures: blocks, first position and end.
    pub fn probed(&self, trial: &Planned) -> Option<(Vec<usize>, (usize, usize))> {
        let span = self.prompt(&trial.cell).probe?;
        let places = &self.prepared.parts[trial.cell.part].places;
        Some((places.iter().map(|place| place.layer).collect(), span))
    }

    /// A token's text.
    pub fn piece(&self, token: u32) -> String {
        let tokenizer = self.prepared.tokenizer.as_ref();
        tokenizer.map_or_else(|| token.to_string(), |tokenizer| tokenizer.piece(token))
    }

    /// Where each token's text ends in a reply's, in bytes; empty where it cannot be told.
    pub fn ends(&self, tokens: &[u32], text: &str) -> Vec<u32> {
        let Some(tokenizer) = &self.prepared.tokenizer else { return Vec::new() };
        let mut ends = Vec::with_capacity(tokens.len());
        // What is decoded anew for each token begins where a character ends, a few tokens before.
        let (mut base, mut from) = (0, 0);
        for at in 0..tokens.len() {
            let piece = tokenizer.decode(&tokens[from..=at]);
            ends.push((base + piece.len()).min(text.len()) as u32);
            if at - from >= 8 && !piece.ends_with(char::REPLACEMENT_CHARACTER) {
                (base, from) = (base + piece.len(), at + 1);
            }
        }
        // A decoder that strips blanks at its start, or a text that was cut, gives another length.
        match ends.last() {
            Some(end) if *end as usize == text.len() => ends,
            _ => Vec::new(),
        }
    }

    /// The texts of the probed tokens.
    pub fn probed_pieces(&self, trial: &Planned) -> &[String] {
        let prompt = self.prompt(&trial.cell);
        prompt.probe.and_then(|(from, to)| prompt.pieces.get(from..to)).unwrap_or_default()
    }

    /// The engine's job: yes and no variants are watched, then a readout's words' first tokens.
    pub fn job(&self, trial: &Planned<'a>) -> Job {
        let inject = trial.cell.at.iter().map(|(place, dose)| {
            let (from, to) = self.window(&trial.cell);
            Injection {
                vector: self.content(&trial.cell, place.layer).vector.clone(),
                site: self.protocol.vectors.site,
                layer: place.layer,
                op: Op::Add,
                strength: *dose as f32,
                mode: self.part(trial).mode,
                from,
                to,
                ..Injection::default()
            }
        });
        Job {
            tokens: self.tokens(trial).to_vec(),
            inject: inject.collect(),
            sampling: self.sampling(&trial.cell, trial.seed),
            n: 1,
            watch: match self.watch(&trial.cell) {
                none if none.is_empty() => vec![0], // so that the first token is reported
                watch => watch,
            },
            capture: [self.capture(trial), self.wanted_captures(trial)].concat(),
            ..Job::default()
        }
    }

    /// The trial's line with nothing measured yet.
    pub fn line(&self, trial: &Planned) -> Trial {
        let cell = &trial.cell;
        Trial {
            id: trial.id.clone(),
            part: self.part(trial).name.clone(),
            prompt: cell.prompt.to_owned(),
            concept: cell.concept.to_owned(),
            sentence: Some(cell.sentence).filter(|text| !text.is_empty()).map(str::to_owned),
            condition: cell.condition,
            other: self.other(cell).map(str::to_owned),
            layer: cell.at.map(|(place, _)| place.layer),
            depth: cell.at.map(|(place, _)| place.depth),
            dose: cell.at.map(|(_, dose)| dose),
            mode: cell.at.map(|_| self.part(trial).mode),
            repeat: cell.repeat,
            seed: trial.seed,
            clean: trial.clean.clone(),
            receipts: Vec::new(),
            first: None,
            next: None,
            read: None,
            reply: None,
            probe: None,
        }
    }

    /// A trial's prompt.
    pub fn prompt(&self, cell: &Cell) -> &PromptRecord {
        let plan = &self.protocol.prompts[cell.prompt];
        let sentence = if plan.uses_sentence() { cell.sentence } else { "" };
        let key = [cell.prompt, cell.prompt_word, sentence].map(str::to_owned);
        &self.prepared.prompts[&key.into()]
    }

    /// The window of a trial's injection.
    fn window(&self, cell: &Cell) -> (usize, Option<usize>) {
        let prompt = self.prompt(cell);
        match cell.condition {
            Condition::After => prompt.after.unwrap_or((prompt.from, prompt.to)),
            _ => (prompt.from, prompt.to),
        }
    }

    /// The word whose vector is injected, where it is not the trial's own.
    fn other(&self, cell: &Cell) -> Option<&'a str> {
        if cell.condition != Condition::Other {
            return None;
        }
        let words = &self.prepared.parts[cell.part].words;
        Some(other_word(words, words.iter().position(|word| word == cell.concept)?))
    }

    /// What the protocol captures of a trial beside what is measured; it stands behind that in its job.
    pub fn wanted_captures(&self, trial: &Planned) -> Vec<Capture> {
        let wanted = &self.part(trial).capture;
        let of = |config| captures_of(wanted, self.tokens(trial).len(), config).ok();
        // They were resolved before the run began.
        self.prepared.config.as_ref().and_then(of).unwrap_or_default()
    }

    fn capture(&self, trial: &Planned) -> Vec<Capture> {
        let kind = self.part(trial).kind;
        if kind != Kind::Probe {
            let last = self.tokens(trial).len() - 1;
            let (site, layer) = (CaptureSite::Logits, None);
            return vec![Capture::rows(site, layer, vec![last])];
        }
        let Some((layers, (from, to))) = self.probed(trial) else { return Vec::new() };
        let site = self.protocol.vectors.site.into();
        let capture = |layer| Capture::rows(site, Some(layer), (from..to).collect());
        layers.into_iter().map(capture).collect()
    }

    fn content(&self, cell: &Cell<'a>, layer: usize) -> &Content {
        let draw = draw(cell.condition, cell.repeat);
        &self.vectors[&(cell.part, cell.concept, layer, cell.condition, draw)]
    }

    fn watch(&self, cell: &Cell) -> Vec<u32> {
        let mut watch = Vec::new();
        if self.protocol.prompts[cell.prompt].yes_no {
            watch.extend(self.prepared.yes.iter().chain(&self.prepared.no));
        }
        if self.protocol.parts[cell.part].kind == Kind::Readout {
            let words = self.prepared.parts[cell.part].words.iter();
            watch.extend(words.map(|word| self.prepared.words[word].tokens[0]));
        }
        watch
    }

    fn sampling(&self, cell: &Cell, seed: u64) -> Sampling {
        match self.protocol.parts[cell.part].kind {
            Kind::Readout | Kind::Probe => Sampling { seed, max_tokens: 0, ..Sampling::default() },
            Kind::Sample(draw) => Sampling {
                temperature: draw.temperature as f32,
                top_p: draw.top_p as f32,
                top_k: draw.top_k,
                seed,
                max_tokens: self.protocol.prompts[cell.prompt]
                    .max_tokens
                    .unwrap_or(draw.max_tokens),
                ..Sampling::default()
            },
        }
    }

    fn id(&self, cell: &Cell<'a>, seed: u64) -> String {
        let (from, to) = self.window(cell);
        let inject = cell.at.map(|(place, dose)| InjectionIdentity {
            vector: &self.content(cell, place.layer).hash,
            site: self.protocol.vectors.site,
            layer: place.layer,
            op: Op::Add,
            dose,
            mode: self.protocol.parts[cell.part].mode,
            from,
            to,
        });
        seeds::trial_id(&Identity {
            schema: SCHEMA,
            model: &self.prepared.model.hash,
            part: &self.protocol.parts[cell.part].name,
            prompt: cell.prompt,
            concept: cell.concept,
            condition: cell.condition,
            repeat: cell.repeat,
            tokens: &self.prompt(cell).tokens,
            inject,
            sampling: self.sampling(cell, seed),
            watch: &self.watch(cell),
        })
    }
}

/// Trials differ where no dimension of a part has a value twice: each is a part of their ids.
fn check_all_differ(protocol: &Protocol, prepared: &Prepared) -> Result<()> {
    let names: Vec<&str> = protocol.parts.iter().map(|part| part.name.as_str()).collect();
    check_distinct(&names, "parts")?;
    for (part, prepared) in protocol.parts.iter().zip(&prepared.parts) {
        let layers: Vec<usize> = prepared.places.iter().map(|place| place.layer).collect();
        check_distinct(&part.prompts, "prompts")
            .and_then(|()| check_distinct(&prepared.words, "words"))
            .and_then(|()| check_distinct(&layers, "layers"))
            .and_then(|()| check_distinct(&part.doses, "doses"))
            .and_then(|()| check_distinct(&part.conditions, "conditions"))
            .at(|| format!("part {:?}", part.name))?;
    }
    Ok(())
}

/// Random vectors of a word at a block: the first repeats have one each, later ones theirs again, so that
/// a control does not hang on one draw and the vectors of many repeats fit in memory.
const DRAWS: u32 = 4;

/// Which of its vectors a condition has in a repeat.
fn draw(condition: Condition, repeat: u32) -> u32 {
    match condition {
        Condition::Random | Condition::Shuffled => repeat % DRAWS,
        Condition::Clean
        | Condition::Concept
        | Condition::Negated
        | Condition::Other
        | Condition::After => 0,
    }
}

/// Half the list away: every word lends its vector to one other.
fn other_word(words: &[String], of: usize) -> &str {
    &words[(of + words.len() / 2) % words.len()]
}

/// Every vector that the trials need, once.
fn contents<'a>(
    protocol: &Protocol,
    prepared: &'a Prepared,
    concepts: &ConceptVectors,
) -> Result<Vectors<'a>> {
    let mut contents = HashMap::new();
    for (index, (part, prepared)) in protocol.parts.iter().zip(&prepared.parts).enumerate() {
        if part.conditions.contains(&Condition::Other) && prepared.words.len() < 2 {
            return Err(
                Error::new("condition other needs two words").at(format!("part {:?}", part.name))
            );
        }
        let words = prepared.words.iter().enumerate();
        for ((at, word), place) in words.flat_map(|w| prepared.places.iter().map(move |p| (w, p))) {
            let layer = place.layer;
            let vector_of = |word: &str| {
                concepts.get(word, layer).ok_or_else(|| {
                    Error::new("no concept vector").at(format!("word {word:?}, layer {layer}"))
                })
            };
            let concept = vector_of(word)?;
            for condition in &part.conditions {
                let last = draw(*condition, part.repeats.min(DRAWS) - 1);
                for draw in 0..=last {
                    let key = |kind| seeds::vector_key(kind, protocol.seed, word, layer, draw);
                    let vector = match condition {
                        Condition::Clean => continue,
                        Condition::Concept | Condition::After => concept.to_vec(),
                        Condition::Other => vector_of(other_word(&prepared.words, at))?.to_vec(),
                        Condition::Random => random_vector(key("random"), concept),
                        Condition::Negated => concept.iter().map(|value| -value).collect(),
                        Condition::Shuffled => shuffled_vector(key("shuffled"), concept),
                    };
                    let hash = seeds::vector_hash(&vector);
                    let content = Content { vector: vector.into(), hash };
                    contents.insert((index, word.as_str(), layer, *condition, draw), content);
                }
            }
        }
    }
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::fake;

    #[test]
    fn every_injected_trial_has_one_clean_partner_of_its_seed() {
        let protocol = Protocol::builtin("demo").unwrap();
        let prepared = fake::prepared(&protocol, 30);
        let vectors = fake::vectors(&prepared);
        let plan = Plan::new(&protocol, &prepared, &vectors).unwrap();
        let by_id: HashMap<String, Planned> =
            plan.trials().map(|trial| (trial.id.clone(), trial)).collect();
        assert_eq!(by_id.len(), plan.grid().len(), "ids are unique");
        for trial in plan.trials() {
            let Some(clean) = &trial.clean else {
                assert_eq!(trial.cell.condition, Condition::Clean);
                continue;
            };
            let clean = &by_id[clean];
            assert_eq!(clean.cell.condition, Condition::Clean);
            assert_eq!((clean.cell.part, clean.cell.prompt), (trial.cell.part, trial.cell.prompt));
            if plan.part(&trial).kind != Kind::Readout {
                assert_eq!((clean.seed, clean.cell.concept), (trial.seed, trial.cell.concept));
                assert_eq!(clean.cell.repeat, trial.cell.repeat);
            }
        }
    }

    #[test]
    fn jobs_carry_vector_window_and_watch() {
        let protocol = Protocol::builtin("demo").unwrap();
        let prepared = fake::prepared(&protocol, 30);
        let vectors = fake::vectors(&prepared);
        let plan = Plan::new(&protocol, &prepared, &vectors).unwrap();
        let find = |part: usize, condition| {
            let mut trials = plan.trials();
            trials.find(|t| t.cell.part == part && t.cell.condition == condition).unwrap()
        };
        let readout = plan.job(&find(0, Condition::Concept));
        assert_eq!(readout.watch.len(), prepared.yes.len() + prepared.no.len() + 50);
        assert_eq!(readout.sampling.max_tokens, 0);
        let clean = plan.job(&find(1, Condition::Clean));
        assert!(clean.inject.is_empty() && clean.sampling.max_tokens == 60);
        let (concept, random) =
            (plan.job(&find(1, Condition::Concept)), plan.job(&find(1, Condition::Random)));
        let (a, b) = (&concept.inject[0], &random.inject[0]);
        assert_eq!((a.from, a.to, a.layer), (fake::WINDOW, None, 12));
        assert_ne!(a.vector, b.vector);
        let norm = crate::engine::vectors::norm;
        assert!((norm(&a.vector) / norm(&b.vector) - 1.0).abs() < 1e-5, "norm-matched");
        assert_eq!(concept.sampling.seed, random.sampling.seed);
        assert_eq!(concept.tokens, clean.tokens);
    }

    #[test]
    fn repeats_have_random_vectors_of_their_own() {
        let mut protocol = Protocol::builtin("demo").unwrap();
        protocol.parts[1].repeats = DRAWS + 1;
        let prepared = fake::prepared(&protocol, 30);
        let vectors = fake::vectors(&prepared);
        let plan = Plan::new(&protocol, &prepared, &vectors).unwrap();
        let of = |condition| {
            let first = plan.trials().find(|t| t.cell.part == 1 && t.cell.condition == condition);
            let first = first.unwrap().cell;
            let same = |t: &Planned| {
                let Cell { part, concept, condition, at, prompt, .. } = t.cell;
                (part, concept, condition, at, prompt)
                    == (first.part, first.concept, first.condition, first.at, first.prompt)
            };
            let vectors =
                plan.trials().filter(same).map(|t| plan.job(&t).inject[0].vector.to_vec());
            vectors.collect::<Vec<_>>()
        };
        let (concept, random) = (of(Condition::Concept), of(Condition::Random));
        assert_eq!((concept.len(), random.len()), (5, 5));
        assert!(concept.iter().all(|vector| *vector == concept[0]));
        assert!((1..4).all(|at| !random[..at].contains(&random[at])));
        assert_eq!(random[4], random[0]);
    }

    #[test]
    fn controls_are_made_of_the_concepts_vector() {
        let mut protocol = Protocol::builtin("demo").unwrap();
        protocol.parts[0].conditions = Condition::ALL.to_vec();
        let prepared = fake::prepared(&protocol, 30);
        let vectors = fake::vectors(&prepared);
        let plan = Plan::new(&protocol, &prepared, &vectors).unwrap();
        let of = |condition| {
            let mut trials = plan.trials();
            let trial = trials.find(|t| t.cell.part == 0 && t.cell.condition == condition).unwrap();
            plan.job(&trial).inject[0].vector.to_vec()
        };
        let concept = of(Condition::Concept);
        let negated: Vec<f32> = concept.iter().map(|value| -value).collect();
        assert_eq!(of(Condition::Negated), negated);
        let (mut sorted, mut shuffled) = (concept.clone(), of(Condition::Shuffled));
        sorted.sort_by(f32::total_cmp);
        shuffled.sort_by(f32::total_cmp);
        assert_eq!(shuffled, sorted);
        let ids: std::collections::BTreeSet<String> = plan.trials().map(|trial| trial.id).collect();
        assert_eq!(ids.len(), plan.grid().len());
    }

    #[test]
    fn no_two_trials_are_the_same() {
        type Change<'a> = &'a dyn Fn(&mut Protocol, &mut Prepared);
        let prepared = fake::prepared(&Protocol::builtin("demo").unwrap(), 30);
        let changes: [(Change, &str); 6] = [
            (&|protocol, _| protocol.parts[1].name = "readout".into(), "parts"),
            (&|protocol, _| protocol.parts[1].prompts.push("cued".into()), "prompts"),
            (
                &|_, prepared| prepared.parts[1].words[0] = prepared.parts[1].words[1].clone(),
                "words",
            ),
            (&|_, prepared| prepared.parts[1].places[0] = prepared.parts[1].places[1], "layers"),
            (&|protocol, _| protocol.parts[1].doses.push(0.5), "doses"),
            (&|protocol, _| protocol.parts[1].conditions.push(Condition::Random), "conditions"),
        ];
        for (change, field) in changes {
            let (mut protocol, mut prepared) =
                (Protocol::builtin("demo").unwrap(), prepared.clone());
            let vectors = fake::vectors(&prepared);
            change(&mut protocol, &mut prepared);
            let error = Plan::new(&protocol, &prepared, &vectors).err().unwrap().to_string();
            assert!(error.contains("twice") && error.contains(field), "{field}: {error}");
        }
    }

    #[test]
    fn prompts_with_the_word_have_a_clean_readout_each() {
        let mut protocol = Protocol::builtin("demo").unwrap();
        protocol.prompts.get_mut("cued").unwrap().turns[2].content.push_str(" Is it {word}?");
        let prepared = fake::prepared(&protocol, 30);
        let vectors = fake::vectors(&prepared);
        let plan = Plan::new(&protocol, &prepared, &vectors).unwrap();
        assert_eq!(plan.grid().outline()[0].clean, 50);
        let trial = plan.trials().find(|t| t.cell.condition == Condition::Concept).unwrap();
        let clean = plan.trials().find(|t| Some(&t.id) == trial.clean.as_ref()).unwrap();
        assert_eq!(plan.tokens(&clean), plan.tokens(&trial));
        assert_eq!(clean.cell.concept, trial.cell.concept);
    }
}
