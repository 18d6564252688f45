//! From a protocol to the list of its trials: pure functions over plain data.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use crate::{
    engine::{Injection, Job},
    error::{Error, Result},
    experiment::{
        prepare::Prepared,
        protocol::{Kind, Part, Place, Protocol},
        results::{Condition, PromptRecord, Trial},
        seeds::{self, Identity, InjectionIdentity, SCHEMA},
        vectors::{ConceptVectors, SITE, random_vector},
    },
    request::{Op, Sampling},
};

/// One trial to be, without its vectors.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    /// Index of the protocol's part.
    pub part: usize,
    /// The prompt's name.
    pub prompt: String,
    /// The word that the prompt is rendered with; "" where it has none.
    pub prompt_word: String,
    /// The word; "" for the clean trial of a readout, which all words share.
    pub concept: String,
    /// What is injected.
    pub condition: Condition,
    /// Where; none for a clean trial.
    pub at: Option<(Place, f64)>,
    /// 0-based.
    pub repeat: u32,
}

/// The size of a part.
#[derive(Clone, Debug, PartialEq)]
pub struct PartOutline {
    /// The part's name.
    pub name: String,
    /// What is measured.
    pub kind: Kind,
    /// The words.
    pub words: Vec<String>,
    /// Blocks and depths.
    pub places: Vec<Place>,
    /// Strengths.
    pub doses: Vec<f64>,
    /// Trials of each cell.
    pub repeats: u32,
    /// Trials with an injection.
    pub injected: usize,
    /// Trials without.
    pub clean: usize,
}

/// A part as it is run, after the cuts.
pub(super) fn grid_of(protocol: &Protocol, prepared: &Prepared, index: usize) -> Grid {
    let part = &protocol.parts[index];
    let mut grid = Grid {
        places: prepared.parts[index].places.clone(),
        doses: part.doses.clone(),
        repeats: part.repeats,
    };
    if let Some(cut) = protocol.cut(&part.name) {
        grid.places.retain(|place| cut.layers.contains(&place.layer));
        grid.doses.retain(|dose| cut.doses.contains(dose));
        grid.repeats = grid.repeats.min(cut.repeats);
    }
    grid
}

/// The dimensions of a part that can be cut.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Grid {
    pub places: Vec<Place>,
    pub doses: Vec<f64>,
    pub repeats: u32,
}

/// All trials, part by part. Within a part the repeats are outermost, so that a run that is stopped
/// early is balanced; then trials of one prompt and layer stand together. Clean trials come first;
/// dose 0 is the clean trial and adds none.
pub fn cells(protocol: &Protocol, prepared: &Prepared) -> Vec<Cell> {
    let mut cells = Vec::new();
    for (index, part) in protocol.parts.iter().enumerate() {
        let grid = grid_of(protocol, prepared, index);
        let words = &prepared.parts[index].words;
        for repeat in 0..grid.repeats {
            for prompt in &part.prompts {
                let uses_word = protocol.prompts[prompt].uses_word();
                let cell = |concept: &str, condition, at| Cell {
                    part: index,
                    prompt: prompt.clone(),
                    prompt_word: if uses_word { concept.to_owned() } else { String::new() },
                    concept: concept.to_owned(),
                    condition,
                    at,
                    repeat,
                };
                if part.kind == Kind::Readout && !uses_word {
                    cells.push(cell("", Condition::Clean, None));
                } else {
                    cells.extend(words.iter().map(|word| cell(word, Condition::Clean, None)));
                }
                for place in &grid.places {
                    for word in words {
                        for (dose, condition) in injections(part, &grid) {
                            cells.push(cell(word, condition, Some((*place, dose))));
                        }
                    }
                }
            }
        }
    }
    cells
}

fn injections(part: &Part, grid: &Grid) -> impl Iterator<Item = (f64, Condition)> {
    let conditions: Vec<Condition> =
        part.conditions.iter().copied().filter(|c| *c != Condition::Clean).collect();
    let doses: Vec<f64> = grid.doses.iter().copied().filter(|dose| *dose != 0.0).collect();
    doses.into_iter().flat_map(move |dose| {
        let conditions = conditions.clone();
        conditions.into_iter().map(move |condition| (dose, condition))
    })
}

/// The size of every part, without running anything.
pub fn outline(protocol: &Protocol, prepared: &Prepared) -> Vec<PartOutline> {
    let cells = cells(protocol, prepared);
    let outline = |(index, part): (usize, &Part)| {
        let grid = grid_of(protocol, prepared, index);
        let clean = |clean: bool| {
            let of_part = cells.iter().filter(|cell| cell.part == index);
            of_part.filter(|cell| (cell.condition == Condition::Clean) == clean).count()
        };
        PartOutline {
            name: part.name.clone(),
            kind: part.kind,
            words: prepared.parts[index].words.clone(),
            places: grid.places,
            doses: grid.doses,
            repeats: grid.repeats,
            injected: clean(false),
            clean: clean(true),
        }
    };
    protocol.parts.iter().enumerate().map(outline).collect()
}

/// A trial that is ready to be run.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Its place in the grid.
    pub cell: Cell,
    /// Hash of all that its result depends on.
    pub id: String,
    /// Its clean partner's id; none for a clean trial.
    pub clean: Option<String>,
    /// The sampling's seed.
    pub seed: u64,
}

/// Every trial of a run, and what is needed to make the engine's jobs of them.
pub struct Plan<'a> {
    protocol: &'a Protocol,
    prepared: &'a Prepared,
    vectors: HashMap<(String, usize, Condition), Content>,
    trials: Vec<Planned>,
}

/// A vector and its hash.
struct Content {
    vector: Arc<[f32]>,
    hash: String,
}

impl<'a> Plan<'a> {
    /// Seeds, ids and vectors of all trials. An error where a vector is missing.
    pub fn new(
        protocol: &'a Protocol,
        prepared: &'a Prepared,
        concepts: &ConceptVectors,
    ) -> Result<Self> {
        let cells = cells(protocol, prepared);
        let vectors = contents(&cells, protocol.seed, concepts)?;
        let mut plan =
            Self { protocol, prepared, vectors, trials: Vec::with_capacity(cells.len()) };
        let mut clean_ids: HashMap<(usize, String, String, u32), String> = HashMap::new();
        let mut seen = BTreeSet::new();
        for cell in cells {
            let seed = seeds::seed(protocol.seed, &cell.prompt, &cell.concept, cell.repeat);
            let id = plan.id(&cell, seed);
            let key =
                |concept: &str| (cell.part, cell.prompt.clone(), concept.to_owned(), cell.repeat);
            let clean = if cell.condition == Condition::Clean {
                clean_ids.insert(key(&cell.concept), id.clone());
                None
            } else {
                // Clean trials stand before the others; a readout's is shared by all words.
                clean_ids.get(&key(&cell.concept)).or_else(|| clean_ids.get(&key(""))).cloned()
            };
            if !seen.insert(id.clone()) {
                return Err(Error::new("two trials are the same").at(format!("{cell:?}")));
            }
            plan.trials.push(Planned { cell, id, clean, seed });
        }
        Ok(plan)
    }

    /// In the order in which they are run.
    pub fn trials(&self) -> &[Planned] {
        &self.trials
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
        if self.protocol.prompts[&trial.cell.prompt].yes_no {
            (self.prepared.yes.len(), self.prepared.no.len())
        } else {
            (0, 0)
        }
    }

    /// The prompt's tokens.
    pub fn tokens(&self, trial: &Planned) -> &[u32] {
        &self.prompt(&trial.cell).tokens
    }

    /// The engine's job: yes and no variants are watched, then a readout's words' first tokens.
    pub fn job(&self, trial: &Planned) -> Job {
        let inject = trial.cell.at.iter().map(|(place, dose)| {
            let prompt = self.prompt(&trial.cell);
            Injection {
                vector: self.content(&trial.cell, place.layer).vector.clone(),
                site: SITE,
                layer: place.layer,
                op: Op::Add,
                strength: *dose as f32,
                mode: self.part(trial).mode,
                from: prompt.from,
                to: prompt.to,
            }
        });
        Job {
            tokens: self.tokens(trial).to_vec(),
            inject: inject.collect(),
            sampling: self.sampling(&trial.cell, trial.seed),
            n: 1,
            watch: self.watch(&trial.cell),
            ..Job::default()
        }
    }

    /// The trial's line with nothing measured yet.
    pub fn line(&self, trial: &Planned) -> Trial {
        let cell = &trial.cell;
        Trial {
            id: trial.id.clone(),
            part: self.part(trial).name.clone(),
            prompt: cell.prompt.clone(),
            concept: cell.concept.clone(),
            condition: cell.condition,
            layer: cell.at.map(|(place, _)| place.layer),
            depth: cell.at.map(|(place, _)| place.depth),
            dose: cell.at.map(|(_, dose)| dose),
            mode: cell.at.map(|_| self.part(trial).mode),
            repeat: cell.repeat,
            seed: trial.seed,
            clean: trial.clean.clone(),
            receipts: Vec::new(),
            first: None,
            read: None,
            reply: None,
        }
    }

    fn prompt(&self, cell: &Cell) -> &PromptRecord {
        &self.prepared.prompts[&(cell.prompt.clone(), cell.prompt_word.clone())]
    }

    fn content(&self, cell: &Cell, layer: usize) -> &Content {
        &self.vectors[&(cell.concept.clone(), layer, cell.condition)]
    }

    fn watch(&self, cell: &Cell) -> Vec<u32> {
        let mut watch = Vec::new();
        if self.protocol.prompts[&cell.prompt].yes_no {
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
            Kind::Readout => Sampling { seed, max_tokens: 0, ..Sampling::default() },
            Kind::Sample(draw) => Sampling {
                temperature: draw.temperature as f32,
                top_p: draw.top_p as f32,
                top_k: draw.top_k,
                seed,
                max_tokens: draw.max_tokens,
                ..Sampling::default()
            },
        }
    }

    fn id(&self, cell: &Cell, seed: u64) -> String {
        let prompt = self.prompt(cell);
        let inject = cell.at.map(|(place, dose)| InjectionIdentity {
            vector: &self.content(cell, place.layer).hash,
            site: SITE,
            layer: place.layer,
            op: Op::Add,
            dose,
            mode: self.protocol.parts[cell.part].mode,
            from: prompt.from,
            to: prompt.to,
        });
        seeds::trial_id(&Identity {
            schema: SCHEMA,
            model: &self.prepared.model.hash,
            part: &self.protocol.parts[cell.part].name,
            prompt: &cell.prompt,
            concept: &cell.concept,
            condition: cell.condition,
            repeat: cell.repeat,
            tokens: &prompt.tokens,
            inject,
            sampling: self.sampling(cell, seed),
            watch: &self.watch(cell),
        })
    }
}

/// Every vector that the cells need, once.
fn contents(
    cells: &[Cell],
    run_seed: u64,
    concepts: &ConceptVectors,
) -> Result<HashMap<(String, usize, Condition), Content>> {
    let mut contents = HashMap::new();
    for cell in cells {
        let Some((place, _)) = cell.at else { continue };
        let key = (cell.concept.clone(), place.layer, cell.condition);
        if contents.contains_key(&key) {
            continue;
        }
        let concept = concepts.get(&cell.concept, place.layer).ok_or_else(|| {
            Error::new("no concept vector")
                .at(format!("word {:?}, layer {}", cell.concept, place.layer))
        })?;
        let vector = match cell.condition {
            Condition::Random => random_vector(run_seed, &cell.concept, place.layer, concept),
            Condition::Clean | Condition::Concept => concept.to_vec(),
        };
        let hash = seeds::vector_hash(&vector);
        contents.insert(key, Content { vector: vector.into(), hash });
    }
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::fake;

    fn plan_of<'a>(protocol: &'a Protocol, prepared: &'a Prepared) -> Plan<'a> {
        Plan::new(protocol, prepared, &fake::vectors(prepared)).unwrap()
    }

    #[test]
    fn the_demo_has_the_promised_size() {
        let protocol = Protocol::builtin("demo").unwrap();
        let prepared = fake::prepared(&protocol, 30);
        let outline = outline(&protocol, &prepared);
        let sizes: Vec<(usize, usize)> =
            outline.iter().map(|part| (part.injected, part.clean)).collect();
        assert_eq!(sizes, [(50 * 5 * 4 * 2, 1), (8 * 4 * 4 * 3 * 2, 24), (8, 2)]);
    }

    #[test]
    fn the_full_protocol_has_the_promised_size() {
        let protocol = Protocol::builtin("injected-thoughts").unwrap();
        let prepared = fake::prepared(&protocol, 30);
        let outline = outline(&protocol, &prepared);
        assert_eq!((outline[1].injected, outline[1].clean), (50 * 16 * 4 * 2, 50));
    }

    #[test]
    fn every_injected_trial_has_one_clean_partner_of_its_seed() {
        let protocol = Protocol::builtin("demo").unwrap();
        let prepared = fake::prepared(&protocol, 30);
        let plan = plan_of(&protocol, &prepared);
        let by_id: HashMap<&str, &Planned> =
            plan.trials().iter().map(|trial| (trial.id.as_str(), trial)).collect();
        assert_eq!(by_id.len(), plan.trials().len(), "ids are unique");
        for trial in plan.trials() {
            let Some(clean) = &trial.clean else {
                assert_eq!(trial.cell.condition, Condition::Clean);
                continue;
            };
            let clean = by_id[clean.as_str()];
            assert_eq!(clean.cell.condition, Condition::Clean);
            assert_eq!(
                (clean.cell.part, &clean.cell.prompt),
                (trial.cell.part, &trial.cell.prompt)
            );
            if plan.part(trial).kind != Kind::Readout {
                assert_eq!((clean.seed, &clean.cell.concept), (trial.seed, &trial.cell.concept));
                assert_eq!(clean.cell.repeat, trial.cell.repeat);
            }
        }
    }

    #[test]
    fn a_prefix_of_the_plan_is_balanced() {
        let protocol = Protocol::builtin("demo").unwrap();
        let prepared = fake::prepared(&protocol, 30);
        let cells = cells(&protocol, &prepared);
        let sampled: Vec<&Cell> = cells.iter().filter(|cell| cell.part == 1).collect();
        assert!(sampled.windows(2).all(|pair| pair[0].repeat <= pair[1].repeat));
        let third = &sampled[..sampled.len() / 3];
        assert!(third.iter().all(|cell| cell.repeat == 0));
        let count = |condition| third.iter().filter(|cell| cell.condition == condition).count();
        assert_eq!(count(Condition::Concept), count(Condition::Random));
    }

    #[test]
    fn jobs_carry_vector_window_and_watch() {
        let protocol = Protocol::builtin("demo").unwrap();
        let prepared = fake::prepared(&protocol, 30);
        let plan = plan_of(&protocol, &prepared);
        let find = |part: usize, condition| {
            let mut trials = plan.trials().iter();
            trials.find(|t| t.cell.part == part && t.cell.condition == condition).unwrap()
        };
        let readout = plan.job(find(0, Condition::Concept));
        assert_eq!(readout.watch.len(), prepared.yes.len() + prepared.no.len() + 50);
        assert_eq!(readout.sampling.max_tokens, 0);
        let clean = plan.job(find(1, Condition::Clean));
        assert!(clean.inject.is_empty() && clean.sampling.max_tokens == 60);
        let (concept, random) =
            (plan.job(find(1, Condition::Concept)), plan.job(find(1, Condition::Random)));
        let (a, b) = (&concept.inject[0], &random.inject[0]);
        assert_eq!((a.from, a.to, a.layer), (fake::WINDOW, None, 12));
        assert_ne!(a.vector, b.vector);
        let norm = crate::engine::vectors::norm;
        assert!((norm(&a.vector) / norm(&b.vector) - 1.0).abs() < 1e-5, "norm-matched");
        assert_eq!(concept.sampling.seed, random.sampling.seed);
        assert_eq!(concept.tokens, clean.tokens);
    }

    #[test]
    fn prompts_with_the_word_have_a_clean_readout_each() {
        let mut protocol = Protocol::builtin("demo").unwrap();
        protocol.prompts.get_mut("cued").unwrap().turns[2].content.push_str(" Is it {word}?");
        let prepared = fake::prepared(&protocol, 30);
        assert_eq!(outline(&protocol, &prepared)[0].clean, 50);
        let plan = plan_of(&protocol, &prepared);
        let trial = plan.trials().iter().find(|t| t.cell.condition == Condition::Concept).unwrap();
        let clean = plan.trials().iter().find(|t| Some(&t.id) == trial.clean.as_ref()).unwrap();
        assert_eq!(plan.tokens(clean), plan.tokens(trial));
        assert_eq!(clean.cell.concept, trial.cell.concept);
    }
}
