//! The order of a protocol's trials as arithmetic: a trial's place gives its cell and its cell its
//! place, so that a million trials take no memory before they are run.

use std::ops::Range;

use crate::experiment::{
    prepare::{Prepared, PreparedPart},
    protocol::{Kind, Part, Place, Protocol},
    results::{Condition, Trial},
};

/// One trial to be, without its vectors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cell<'a> {
    /// Index of the protocol's part.
    pub part: usize,
    /// The prompt's name.
    pub prompt: &'a str,
    /// The word that the prompt is rendered with; "" where it has none.
    pub prompt_word: &'a str,
    /// The sentence of the word; "" in parts without.
    pub sentence: &'a str,
    /// The word; "" for the clean trial of a readout, which all words share.
    pub concept: &'a str,
    /// What is injected.
    pub condition: Condition,
    /// Where, and how strongly; none for a clean trial.
    pub at: Option<(Place, f64)>,
    /// 0-based.
    pub repeat: u32,
}

/// The dimensions of a part that can be cut.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Dimensions {
    pub places: Vec<Place>,
    pub doses: Vec<f64>,
    pub repeats: u32,
}

impl Dimensions {
    /// Those of a part as it is run, after the protocol's cuts.
    pub fn of(protocol: &Protocol, prepared: &Prepared, index: usize) -> Self {
        let part = &protocol.parts[index];
        let mut dimensions = Self {
            places: prepared.parts[index].places.clone(),
            doses: part.doses.clone(),
            repeats: part.repeats,
        };
        if let Some(cut) = protocol.cut(&part.name) {
            dimensions.places.retain(|place| cut.layers.contains(&place.layer));
            dimensions.doses.retain(|dose| cut.doses.contains(dose));
            dimensions.repeats = dimensions.repeats.min(cut.repeats);
        }
        dimensions
    }
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

/// All trials, part by part. Within a part the repeats are outermost, so that a run that is stopped
/// early is balanced; then trials of one prompt and layer stand together. A prompt's clean trials
/// come first; dose 0 is the clean trial and adds none.
#[derive(Debug)]
pub struct Grid<'a> {
    parts: Vec<PartGrid<'a>>,
}

#[derive(Debug)]
struct PartGrid<'a> {
    part: &'a Part,
    /// Its first trial's place.
    from: usize,
    words: &'a [String],
    /// One for each word, or none.
    sentences: &'a [String],
    dimensions: Dimensions,
    /// What is injected of one word at one block.
    injections: Vec<(f64, Condition)>,
    prompts: Vec<PromptGrid<'a>>,
}

#[derive(Debug)]
struct PromptGrid<'a> {
    name: &'a str,
    /// Whether it names the word.
    uses_word: bool,
    /// Whether all words share one clean trial: a readout's is the same whatever word is read.
    shares_clean: bool,
}

impl<'a> Grid<'a> {
    /// The trials of a protocol after its cuts.
    pub fn new(protocol: &'a Protocol, prepared: &'a Prepared) -> Self {
        let mut parts: Vec<PartGrid> = Vec::new();
        for (index, part) in protocol.parts.iter().enumerate() {
            let from = parts.last().map_or(0, |last| last.from + last.len());
            let dimensions = Dimensions::of(protocol, prepared, index);
            let conditions = part.conditions.iter().filter(|c| **c != Condition::Clean);
            let doses = dimensions.doses.iter().filter(|dose| **dose != 0.0);
            let injections =
                doses.flat_map(|dose| conditions.clone().map(|condition| (*dose, *condition)));
            let injections = injections.collect();
            let prompt = |name: &'a String| {
                let plan = &protocol.prompts[name];
                let uses_word = plan.uses_word();
                let is_same = !uses_word && !plan.uses_sentence();
                PromptGrid { name, uses_word, shares_clean: part.kind == Kind::Readout && is_same }
            };
            let prompts = part.prompts.iter().map(prompt).collect();
            let PreparedPart { words, sentences, .. } = &prepared.parts[index];
            parts.push(PartGrid { part, from, words, sentences, dimensions, injections, prompts });
        }
        Self { parts }
    }

    /// The number of trials.
    pub fn len(&self) -> usize {
        self.parts.last().map_or(0, |last| last.from + last.len())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The places of a part's trials.
    pub fn of_part(&self, part: usize) -> Range<usize> {
        let from = self.parts[part].from;
        from..from + self.parts[part].len()
    }

    /// The places of a part's first repeat.
    pub(super) fn first_repeat(&self, part: usize) -> Range<usize> {
        let from = self.parts[part].from;
        from..from + self.parts[part].len_of_repeat().min(self.parts[part].len())
    }

    /// The trial at a place below [`Grid::len`].
    pub fn cell(&self, place: usize) -> Cell<'a> {
        let part = self.parts.partition_point(|part| part.from <= place) - 1;
        self.parts[part].cell(part, place - self.parts[part].from)
    }

    /// The place of a trial's clean partner; none for a clean trial.
    pub fn clean_of(&self, place: usize) -> Option<usize> {
        let cell = self.cell(place);
        cell.at?;
        let of = &self.parts[cell.part];
        let prompt = of.prompts.iter().position(|prompt| prompt.name == cell.prompt)?;
        let concept = if of.prompts[prompt].shares_clean { "" } else { cell.concept };
        Some(of.from + of.clean_place(cell.repeat, prompt, concept)?)
    }

    /// The place of a trial of a run's folder by what it says of itself; none for a stranger.
    pub fn find(&self, trial: &Trial) -> Option<usize> {
        let of = self.parts.iter().find(|of| of.part.name == trial.part)?;
        let prompt = of.prompts.iter().position(|prompt| prompt.name == trial.prompt)?;
        if trial.repeat >= of.dimensions.repeats {
            return None;
        }
        let (Some(layer), Some(dose)) = (trial.layer, trial.dose) else {
            return Some(of.from + of.clean_place(trial.repeat, prompt, &trial.concept)?);
        };
        let places = &of.dimensions.places;
        let layer = places.iter().position(|place| place.layer == layer)?;
        let word = of.words.iter().position(|word| *word == trial.concept)?;
        let injection = (dose, trial.condition);
        let injection = of.injections.iter().position(|other| *other == injection)?;
        let injected = (layer * of.words.len() + word) * of.injections.len() + injection;
        Some(of.from + of.start(trial.repeat, prompt) + of.cleans(prompt) + injected)
    }

    /// How many cells the injected trials stand in.
    pub fn cells(&self) -> usize {
        let of = |part: &PartGrid| {
            part.prompts.len() * part.dimensions.places.len() * part.injections.len()
        };
        self.parts.iter().map(of).sum()
    }

    /// The size of every part.
    pub fn outline(&self) -> Vec<PartOutline> {
        let outline = |of: &PartGrid| {
            let repeats = of.dimensions.repeats as usize;
            let cleans: usize = (0..of.prompts.len()).map(|prompt| of.cleans(prompt)).sum();
            PartOutline {
                name: of.part.name.clone(),
                kind: of.part.kind,
                words: of.words.to_vec(),
                places: of.dimensions.places.clone(),
                doses: of.dimensions.doses.clone(),
                repeats: of.dimensions.repeats,
                injected: repeats * of.prompts.len() * of.injected(),
                clean: repeats * cleans,
            }
        };
        self.parts.iter().map(outline).collect()
    }
}

impl<'a> PartGrid<'a> {
    fn len(&self) -> usize {
        self.dimensions.repeats as usize * self.len_of_repeat()
    }

    fn len_of_repeat(&self) -> usize {
        self.start(0, self.prompts.len())
    }

    /// Where a prompt's trials begin, counted from the part's first.
    fn start(&self, repeat: u32, prompt: usize) -> usize {
        let of_prompts = |prompts: usize| -> usize {
            (0..prompts).map(|prompt| self.cleans(prompt) + self.injected()).sum()
        };
        repeat as usize * of_prompts(self.prompts.len()) + of_prompts(prompt)
    }

    /// Clean trials of a prompt in one repeat.
    fn cleans(&self, prompt: usize) -> usize {
        if self.prompts[prompt].shares_clean { 1 } else { self.words.len() }
    }

    /// Injected trials of each prompt in one repeat.
    fn injected(&self) -> usize {
        self.dimensions.places.len() * self.words.len() * self.injections.len()
    }

    fn clean_place(&self, repeat: u32, prompt: usize, concept: &str) -> Option<usize> {
        let word = if self.prompts[prompt].shares_clean {
            concept.is_empty().then_some(0)
        } else {
            self.words.iter().position(|word| word == concept)
        };
        Some(self.start(repeat, prompt) + word?)
    }

    fn cell(&self, part: usize, place: usize) -> Cell<'a> {
        let repeat = (place / self.len_of_repeat()) as u32;
        let starts =
            (0..self.prompts.len()).rev().map(|prompt| (prompt, self.start(repeat, prompt)));
        let found = starts.into_iter().find(|(_, start)| *start <= place);
        let (index, start) = found.expect("the first prompt starts with its repeat");
        let prompt = &self.prompts[index];
        let cell = |word: Option<usize>, condition, at| {
            let concept = word.map_or("", |word| self.words[word].as_str());
            Cell {
                part,
                prompt: prompt.name,
                prompt_word: if prompt.uses_word { concept } else { "" },
                sentence: word.and_then(|word| self.sentences.get(word)).map_or("", String::as_str),
                concept,
                condition,
                at,
                repeat,
            }
        };
        let Some(injected) = (place - start).checked_sub(self.cleans(index)) else {
            let word = (!prompt.shares_clean).then_some(place - start);
            return cell(word, Condition::Clean, None);
        };
        let (rest, injection) =
            (injected / self.injections.len(), injected % self.injections.len());
        let (dose, condition) = self.injections[injection];
        let place = self.dimensions.places[rest / self.words.len()];
        cell(Some(rest % self.words.len()), condition, Some((place, dose)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::{fake, plan::Plan};

    #[test]
    fn the_demo_has_the_promised_size() {
        let protocol = Protocol::builtin("demo").unwrap();
        let prepared = fake::prepared(&protocol, 30);
        let grid = Grid::new(&protocol, &prepared);
        let sizes: Vec<(usize, usize)> =
            grid.outline().iter().map(|part| (part.injected, part.clean)).collect();
        assert_eq!(sizes, [(50 * 5 * 4 * 2, 1), (8 * 4 * 4 * 3 * 2, 24), (8, 2)]);
        assert_eq!(grid.len(), 2001 + 792 + 10);
        assert_eq!(grid.cells(), 5 * 4 * 2 + 4 * 4 * 2 + 2 * 4);
        assert_eq!(grid.of_part(1), 2001..2793);
        assert_eq!(grid.first_repeat(1), 2001..2001 + 264);
    }

    #[test]
    fn the_full_protocol_has_the_promised_size() {
        let protocol = Protocol::builtin("injected-thoughts").unwrap();
        let prepared = fake::prepared(&protocol, 30);
        let outline = Grid::new(&protocol, &prepared).outline();
        assert_eq!((outline[1].injected, outline[1].clean), (50 * 16 * 4 * 2, 50));
    }

    /// The order written as loops.
    fn listed<'a>(protocol: &'a Protocol, prepared: &'a Prepared) -> Vec<Cell<'a>> {
        let mut cells = Vec::new();
        for (index, part) in protocol.parts.iter().enumerate() {
            let dimensions = Dimensions::of(protocol, prepared, index);
            let words = &prepared.parts[index].words;
            for repeat in 0..dimensions.repeats {
                for prompt in &part.prompts {
                    let uses_word = protocol.prompts[prompt].uses_word();
                    let cell = |concept: &'a str, condition, at| Cell {
                        part: index,
                        prompt,
                        prompt_word: if uses_word { concept } else { "" },
                        sentence: "",
                        concept,
                        condition,
                        at,
                        repeat,
                    };
                    if part.kind == Kind::Readout && !uses_word {
                        cells.push(cell("", Condition::Clean, None));
                    } else {
                        cells.extend(words.iter().map(|word| cell(word, Condition::Clean, None)));
                    }
                    for place in &dimensions.places {
                        for word in words {
                            for dose in dimensions.doses.iter().filter(|dose| **dose != 0.0) {
                                for condition in &part.conditions {
                                    if *condition != Condition::Clean {
                                        cells.push(cell(word, *condition, Some((*place, *dose))));
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
        cells
    }

    #[test]
    fn places_cells_and_lines_agree() {
        let mut with_words = Protocol::builtin("demo").unwrap();
        with_words.prompts.get_mut("cued").unwrap().turns[2].content.push_str(" Is it {word}?");
        let mut controls = Protocol::builtin("demo").unwrap();
        controls.parts[0].doses = vec![0.0];
        controls.parts[1].conditions = vec![Condition::Clean];
        for protocol in [Protocol::builtin("demo").unwrap(), with_words, controls] {
            let prepared = fake::prepared(&protocol, 30);
            let grid = Grid::new(&protocol, &prepared);
            let listed = listed(&protocol, &prepared);
            let cells: Vec<Cell> = (0..grid.len()).map(|place| grid.cell(place)).collect();
            assert_eq!(cells, listed);
            let vectors = fake::vectors(&prepared);
            let plan = Plan::new(&protocol, &prepared, &vectors).unwrap();
            for place in 0..grid.len() {
                let trial = plan.trial(place);
                assert_eq!(grid.find(&plan.line(&trial)), Some(place));
                let clean = grid.clean_of(place).map(|clean| plan.trial(clean).id);
                assert_eq!(clean, trial.clean);
            }
        }
    }

    #[test]
    fn strangers_have_no_place() {
        let protocol = Protocol::builtin("demo").unwrap();
        let prepared = fake::prepared(&protocol, 30);
        let grid = Grid::new(&protocol, &prepared);
        let vectors = fake::vectors(&prepared);
        let plan = Plan::new(&protocol, &prepared, &vectors).unwrap();
        let line = plan.line(&plan.trial(2500));
        let strangers = [
            Trial { part: "none".into(), ..line.clone() },
            Trial { prompt: "none".into(), ..line.clone() },
            Trial { concept: "none".into(), ..line.clone() },
            Trial { condition: Condition::Clean, ..line.clone() },
            Trial { layer: Some(13), ..line.clone() },
            Trial { dose: Some(0.3), ..line.clone() },
            Trial { repeat: 3, ..line.clone() },
        ];
        assert!(strangers.iter().all(|stranger| grid.find(stranger).is_none()));
    }

    #[test]
    fn a_prefix_is_balanced() {
        let protocol = Protocol::builtin("demo").unwrap();
        let prepared = fake::prepared(&protocol, 30);
        let grid = Grid::new(&protocol, &prepared);
        let sampled: Vec<Cell> = grid.of_part(1).map(|place| grid.cell(place)).collect();
        assert!(sampled.windows(2).all(|pair| pair[0].repeat <= pair[1].repeat));
        let third = &sampled[..sampled.len() / 3];
        assert!(third.iter().all(|cell| cell.repeat == 0));
        let count = |condition| third.iter().filter(|cell| cell.condition == condition).count();
        assert_eq!(count(Condition::Concept), count(Condition::Random));
    }
}
