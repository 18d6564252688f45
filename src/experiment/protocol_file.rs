//! Reads a protocol's TOML file: strict, with defaults.

use std::{collections::BTreeMap, path::Path};

use serde::Deserialize;

use crate::{
    error::{Context, Error, Result},
    experiment::{
        judging::chat::Endpoint,
        protocol::{
            Answer, Answers, Chat, Draw, JudgePlan, Kind, Part, Places, PromptPlan, Protocol,
            Recipe, Setting, Table, VectorRecipe, Window,
        },
        results::{Condition, Criterion, Outcome},
        words,
    },
    hub::Name,
    request::{All, Capture, CaptureSite, Message, Site, StrengthMode},
};

/// The doses of a part that names none, in reference units.
const DOSES: [f64; 4] = [0.125, 0.25, 0.5, 1.0];
/// What texts may hold. A prompt's question is put in when the file is read.
const PLACEHOLDERS: [&str; 4] = ["word", "trial", "sentence", "question"];

/// A protocol: an experiment as data.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct File {
    /// Its name.
    name: String,
    /// What it asks, in a sentence.
    #[serde(default)]
    about: String,
    /// The seed of the run.
    #[serde(default)]
    seed: u64,
    /// Seconds that the trials may take; what would take longer is left out and named.
    budget_seconds: Option<f64>,
    /// Settings of the chat template, for all prompts and vectors.
    #[serde(default)]
    chat: Chat,
    /// How concept vectors are made.
    #[serde(default)]
    vectors: VectorsTable,
    /// The answers to yes/no questions.
    answers: Option<Answers>,
    /// By name.
    prompts: BTreeMap<String, PromptTable>,
    /// Grids of trials, in the order in which they are run.
    parts: Vec<PartTable>,
    /// Who grades the replies; rules, where nothing is said.
    judges: Option<Vec<JudgePlan>>,
    /// The sections of the report that are shown; all, where nothing is said.
    #[serde(default)]
    tables: Vec<Table>,
}

/// How concept vectors are made.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
struct VectorsTable {
    /// The arithmetic.
    recipe: Recipe,
    /// Where vectors are taken, injected and probed.
    site: Site,
    /// The user's turn; {word} is the word, lower-cased.
    template: String,
    /// Words whose mean is subtracted (mean-difference).
    baseline: Words,
    /// Turns with and without the concept (contrast, pca).
    pairs: Vec<(String, String)>,
    /// Words whose vectors are projected out.
    orthogonal_to: Option<Words>,
    /// A vector set that has the words (file).
    file: Option<String>,
}

impl Default for VectorsTable {
    fn default() -> Self {
        Self {
            recipe: Recipe::MeanDifference,
            site: Site::default(),
            template: "Tell me about {word}".into(),
            baseline: Words::Named("builtin:baseline".into()),
            pairs: Vec::new(),
            orthogonal_to: None,
            file: None,
        }
    }
}

/// `builtin:NAME`, a file, or the words themselves.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
enum Words {
    Named(String),
    Inline(Vec<String>),
}

/// A prompt: a chat with places for words, a window of injections, and what its replies are judged on.
#[derive(Clone, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct PromptTable {
    /// Another prompt, which gives what this one does not say.
    like: Option<String>,
    /// The chat.
    turns: Option<Vec<TurnTable>>,
    /// What {question} stands for.
    question: Option<String>,
    /// Text that the answer starts with.
    prefill: Option<String>,
    /// What {trial} stands for.
    trial: Option<u32>,
    /// Whether it is a yes/no question, read at the first answer token.
    yes_no: Option<bool>,
    /// The right answer of a question that has nothing to do with thoughts.
    answer: Option<Answer>,
    /// What replies are judged on.
    outcome: Option<Outcome>,
    /// The verdicts that make a success, all together.
    success: Option<Vec<Criterion>>,
    /// The most tokens of its replies, instead of the part's.
    max_tokens: Option<u32>,
    /// Where injections act.
    window: Option<Window>,
    /// Where those of condition after act.
    after: Option<Window>,
    /// The tokens that parts of kind probe look at.
    probe: Option<Window>,
}

impl PromptTable {
    /// With all that it does not say itself from another; the right answer belongs to a question alone.
    fn like(self, other: Self) -> Self {
        Self {
            like: None,
            turns: self.turns.or(other.turns),
            question: self.question.or(other.question),
            prefill: self.prefill.or(other.prefill),
            trial: self.trial.or(other.trial),
            yes_no: self.yes_no.or(other.yes_no),
            answer: self.answer,
            outcome: self.outcome.or(other.outcome),
            success: self.success.or(other.success),
            max_tokens: self.max_tokens.or(other.max_tokens),
            window: self.window.or(other.window),
            after: self.after.or(other.after),
            probe: self.probe.or(other.probe),
        }
    }
}

/// One turn of a chat.
#[derive(Clone, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct TurnTable {
    /// system, user or assistant.
    role: String,
    /// May hold {word}, {sentence}, {trial} and {question}.
    text: String,
}

/// A grid of trials: prompts x words x layers x doses x conditions x repeats.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct PartTable {
    /// Its name.
    name: String,
    /// What is measured.
    kind: KindName,
    /// Names of prompts.
    prompts: Vec<String>,
    /// The words.
    words: Words,
    /// The sentences that go with the words.
    sentences: Option<Words>,
    /// Only words that are one token, lower-cased after a space.
    #[serde(default)]
    single_token: bool,
    /// This many words, from the front.
    count: Option<usize>,
    /// Fractions of the depth.
    depths: Option<Vec<f64>>,
    /// Blocks, from 0.
    layers: Option<LayersField>,
    /// Strengths in units of the mode; 0 is the clean trial.
    doses: Option<Vec<f64>>,
    /// The unit of the doses.
    #[serde(default = "reference")]
    mode: StrengthMode,
    /// What is injected; clean is always run.
    conditions: Option<Vec<Condition>>,
    /// Trials of each cell, with different seeds.
    repeats: Option<u32>,
    /// The most tokens of a reply.
    max_tokens: Option<u32>,
    /// 0 is greedy.
    temperature: Option<f64>,
    /// 1: all tokens.
    top_p: Option<f64>,
    /// 0: all tokens.
    top_k: Option<u32>,
    /// What is copied out of every trial's prompt.
    #[serde(default)]
    capture: Vec<Capture>,
    /// Words to compare with (probes).
    band: Option<Words>,
    /// Pairs of prompts to compare (probes).
    contrasts: Option<Vec<(String, String)>>,
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
enum KindName {
    Readout,
    Sample,
    Probe,
}

/// `[1, 2]`, `"all"` or `{ evenly = 16 }`.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
enum LayersField {
    List(Vec<usize>),
    All(All),
    Evenly(Evenly),
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct Evenly {
    evenly: usize,
}

fn reference() -> StrengthMode {
    StrengthMode::Reference
}

/// Reads and checks; word lists are looked for in `base`.
pub(super) fn parse(text: &str, base: &Path, settings: &[Setting]) -> Result<Protocol> {
    let broken =
        |error: toml::de::Error| Error::new("not a protocol").got(error.to_string().trim_end());
    // The text itself where nothing is set: its errors know their lines.
    let file: File = if settings.is_empty() {
        toml::from_str(text).map_err(broken)?
    } else {
        let mut table: toml::Table = toml::from_str(text).map_err(broken)?;
        settings.iter().try_for_each(|setting| setting.apply(&mut table))?;
        table.try_into().map_err(broken)?
    };
    if file.name.trim().is_empty() {
        return Err(Error::new("the protocol has no name").at("name"));
    }
    check(file.budget_seconds.is_none_or(|seconds| seconds.is_finite() && seconds > 0.0), || {
        Error::new("not a time").at("budget_seconds").expected("seconds above 0")
    })?;
    let vectors = vectors(file.vectors, base).at(|| "vectors".into())?;
    let answers = file.answers.unwrap_or_else(default_answers);
    for (name, list) in [("yes", &answers.yes), ("no", &answers.no)] {
        check(!list.is_empty(), || Error::new("no answers").at(format!("answers.{name}")))?;
    }
    let mut prompts = BTreeMap::new();
    for (name, table) in &file.prompts {
        let plan = prompt(table.clone(), &file.prompts).at(|| format!("prompts.{name}"))?;
        prompts.insert(name.clone(), plan);
    }
    check(!file.parts.is_empty(), || Error::new("the protocol has no parts").at("parts"))?;
    let mut parts: Vec<Part> = Vec::new();
    for (index, table) in file.parts.into_iter().enumerate() {
        let place = format!("parts[{index}] ({:?})", table.name);
        let part = part(table, &prompts, base).at(|| place.clone())?;
        check(parts.iter().all(|other| other.name != part.name), || {
            Error::new("two parts of one name").at(place.clone())
        })?;
        check(part.capture.is_empty() || file.budget_seconds.is_none(), || {
            Error::new("a protocol with a budget captures nothing")
                .at(place.clone())
                .hint("trials are measured before the folder is begun: take budget_seconds out")
        })?;
        parts.push(part);
    }
    Ok(Protocol {
        name: file.name,
        about: file.about,
        seed: file.seed,
        budget_seconds: file.budget_seconds,
        chat: file.chat,
        vectors,
        answers,
        prompts,
        parts,
        judges: judges(file.judges, base).at(|| "judges".into())?,
        tables: file.tables,
        cuts: Vec::new(),
    })
}

fn check(good: bool, error: impl FnOnce() -> Error) -> Result<()> {
    if good { Ok(()) } else { Err(error()) }
}

/// With their files beside the protocol, and addresses that hold no secret.
fn judges(given: Option<Vec<JudgePlan>>, base: &Path) -> Result<Vec<JudgePlan>> {
    let mut judges = given.unwrap_or_else(|| vec![JudgePlan::Rules]);
    for judge in &mut judges {
        match judge {
            JudgePlan::Rules => {}
            JudgePlan::Local { model, questions } => {
                let path = base.join(&*model);
                let of_hub = model.to_str().is_some_and(|text| Name::parse(text).is_some());
                if path.exists() || !of_hub {
                    *model = path;
                }
                *questions = questions.take().map(|file| base.join(file));
            }
            JudgePlan::Http { url, name, questions, .. } => {
                Endpoint::new(url.as_str(), name.as_str()).check()?;
                *questions = questions.take().map(|file| base.join(file));
            }
        }
    }
    Ok(judges)
}

fn default_answers() -> Answers {
    let forms = |words: [&str; 3]| {
        words.iter().flat_map(|word| [(*word).to_owned(), format!(" {word}")]).collect()
    };
    Answers { yes: forms(["Yes", "yes", "YES"]), no: forms(["No", "no", "NO"]) }
}

fn vectors(table: VectorsTable, base: &Path) -> Result<VectorRecipe> {
    let template = table.template;
    check(template.contains("{word}"), || {
        Error::new("the template does not name the word")
            .at("template")
            .expected("{word} somewhere in it")
            .got(format!("{template:?}"))
    })?;
    check_placeholders(&template, &["word"]).at(|| "template".into())?;
    check(table.site.is_stream(), || {
        Error::new("trials inject into the stream")
            .at("site")
            .expected("resid_pre, resid_mid or resid_post")
            .got(CaptureSite::from(table.site).name())
    })?;
    let baseline = read_words(table.baseline, base).at(|| "baseline".into())?;
    check(baseline.len() >= 2, || {
        Error::new("too few baseline words").at("baseline").expected("2 or more")
    })?;
    let uses_pairs = matches!(table.recipe, Recipe::Contrast | Recipe::Pca);
    check(uses_pairs != table.pairs.is_empty(), || {
        Error::new("pairs of texts go with the recipes contrast and pca")
            .at("pairs")
            .expected("pairs = [[\"with {word}\", \"without\"], ...] there, and nowhere else")
    })?;
    for (with, without) in &table.pairs {
        check(with.contains("{word}"), || {
            Error::new("the first text of a pair does not name the word").at("pairs").got(with)
        })?;
        for text in [with, without] {
            check_placeholders(text, &["word"]).at(|| "pairs".into())?;
        }
    }
    let is_file = table.recipe == Recipe::File;
    check(is_file == table.file.is_some(), || {
        Error::new("a file of vectors goes with the recipe file").at("file")
    })?;
    let orthogonal_to = match table.orthogonal_to {
        Some(list) => read_words(list, base).at(|| "orthogonal_to".into())?,
        None => Vec::new(),
    };
    check(!is_file || orthogonal_to.is_empty(), || {
        Error::new("vectors of a file are taken as they are").at("orthogonal_to")
    })?;
    Ok(VectorRecipe {
        recipe: table.recipe,
        site: table.site,
        template,
        baseline,
        pairs: table.pairs,
        orthogonal_to,
        file: table.file.map(|file| base.join(file)),
    })
}

fn read_words(words: Words, base: &Path) -> Result<Vec<String>> {
    match words {
        Words::Named(list) => words::load(&list, base),
        Words::Inline(words) => {
            check(!words.is_empty() && words.iter().all(|word| !word.trim().is_empty()), || {
                Error::new("no words, or an empty one")
            })?;
            Ok(words)
        }
    }
}

fn prompt(mut table: PromptTable, all: &BTreeMap<String, PromptTable>) -> Result<PromptPlan> {
    if let Some(name) = table.like.take() {
        let other = all.get(&name).filter(|other| other.like.is_none());
        let other = other.ok_or_else(|| {
            Error::new("not a prompt that another can be like")
                .at("like")
                .expected("the name of a prompt that is not like a third")
                .got(format!("{name:?}"))
        })?;
        table = table.like(other.clone());
    }
    let turns = table.turns.unwrap_or_default();
    check(!turns.is_empty(), || Error::new("a prompt without turns").at("turns"))?;
    for (index, turn) in turns.iter().enumerate() {
        let place = || format!("turns[{index}]");
        check(["system", "user", "assistant"].contains(&turn.role.as_str()), || {
            Error::new("unknown role")
                .at(place())
                .expected("system, user or assistant")
                .got(format!("{:?}", turn.role))
        })?;
        check_placeholders(&turn.text, &PLACEHOLDERS).at(place)?;
    }
    if let Some(prefill) = &table.prefill {
        check_placeholders(prefill, &PLACEHOLDERS).at(|| "prefill".into())?;
    }
    let outcome = table.outcome.unwrap_or_default();
    let yes_no = table.yes_no.unwrap_or(outcome == Outcome::Detection);
    check(yes_no || table.answer.is_none(), || {
        Error::new("only a yes/no question has a right answer").at("answer")
    })?;
    let asks = turns.iter().any(|turn| turn.text.contains(QUESTION));
    check(asks == table.question.is_some(), || {
        Error::new("a question goes with its place in the text")
            .at("question")
            .expected(format!("both `question` and {QUESTION} in a turn's text, or neither"))
    })?;
    let question = table.question.unwrap_or_default();
    check_placeholders(&question, &["word", "trial", "sentence"]).at(|| "question".into())?;
    let success = table.success.unwrap_or_else(|| outcome.success(yes_no));
    check(table.max_tokens != Some(0), || Error::new("nothing is drawn").at("max_tokens"))?;
    check_distinct(&success, "success")?;
    check(!success.is_empty() && success.iter().all(|c| outcome.criteria().contains(c)), || {
        let judged = outcome.criteria().iter().map(|criterion| criterion.name());
        Error::new("a success is made of what the replies are judged on")
            .at("success")
            .expected(judged.collect::<Vec<_>>().join(", "))
    })?;
    let ask = |text: &str| text.replace(QUESTION, &question);
    let message = |turn: &TurnTable| Message { role: turn.role.clone(), content: ask(&turn.text) };
    Ok(PromptPlan {
        turns: turns.iter().map(message).collect(),
        prefill: table.prefill.as_deref().map(ask),
        trial: table.trial.unwrap_or(1),
        yes_no,
        answer: table.answer,
        outcome,
        success,
        max_tokens: table.max_tokens,
        window: table.window.unwrap_or_default().map_texts(ask),
        after: table.after.map(|window| window.map_texts(ask)),
        probe: table.probe.map(|window| window.map_texts(ask)),
    })
}

const QUESTION: &str = "{question}";

/// A misspelt `{wrod}` would reach the model as it is.
fn check_placeholders(text: &str, known: &[&str]) -> Result<()> {
    for rest in text.split('{').skip(1) {
        let Some((name, _)) = rest.split_once('}') else { continue };
        let is_name = !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        check(!is_name || known.contains(&name), || {
            let known: Vec<String> = known.iter().map(|name| format!("{{{name}}}")).collect();
            Error::new("unknown placeholder")
                .expected(known.join(" or "))
                .got(format!("{{{name}}}"))
        })?;
    }
    Ok(())
}

fn part(table: PartTable, prompts: &BTreeMap<String, PromptPlan>, base: &Path) -> Result<Part> {
    check(!table.name.trim().is_empty(), || Error::new("a part without a name"))?;
    check(!table.prompts.is_empty(), || Error::new("a part without prompts").at("prompts"))?;
    check_distinct(&table.prompts, "prompts")?;
    for name in &table.prompts {
        check(prompts.contains_key(name), || {
            let known: Vec<&str> = prompts.keys().map(String::as_str).collect();
            Error::new("no such prompt").at("prompts").expected(known.join(", ")).got(name)
        })?;
    }
    let kind = kind(&table)?;
    let plans = || table.prompts.iter().map(|name| (name, &prompts[name]));
    let places = places(table.depths, table.layers)?;
    let is_probe = kind == Kind::Probe;
    let doses = table.doses.unwrap_or_else(|| if is_probe { vec![] } else { DOSES.to_vec() });
    check(is_probe || !doses.is_empty() && doses.iter().all(|dose| dose.is_finite()), || {
        Error::new("no doses, or one that is not finite").at("doses")
    })?;
    check_distinct(&doses, "doses")?;
    let conditions = if is_probe { vec![Condition::Clean] } else { conditions(table.conditions)? };
    let without = |has: &dyn Fn(&PromptPlan) -> bool| {
        plans().find(|(_, plan)| !has(plan)).map(|(name, _)| name.clone())
    };
    if conditions.contains(&Condition::After)
        && let Some(name) = without(&|plan| plan.after.is_some())
    {
        return Err(Error::new("condition after needs a window")
            .at(format!("prompts.{name}.after"))
            .expected("from and to, as in window"));
    }
    if is_probe && let Some(name) = without(&|plan| plan.probe.is_some()) {
        return Err(Error::new("a probe needs the tokens that it looks at")
            .at(format!("prompts.{name}.probe"))
            .expected("from and to, as in window"));
    }
    let sentences = match table.sentences {
        Some(list) => read_words(list, base).at(|| "sentences".into())?,
        None => Vec::new(),
    };
    if sentences.is_empty()
        && let Some((name, _)) = plans().find(|(_, plan)| plan.uses_sentence())
    {
        return Err(Error::new("the part has no sentences")
            .at("sentences")
            .expected(format!("a list: prompt {name:?} has a place for one")));
    }
    let band = match table.band {
        Some(list) => read_words(list, base).at(|| "band".into())?,
        None => Vec::new(),
    };
    let contrasts = table.contrasts.unwrap_or_default();
    for name in contrasts.iter().flat_map(|(first, second)| [first, second]) {
        check(table.prompts.contains(name), || {
            Error::new("no such prompt in this part").at("contrasts").got(name)
        })?;
    }
    let words = read_words(table.words, base).at(|| "words".into())?;
    let lower: Vec<String> = words.iter().map(|word| word.to_lowercase()).collect();
    check_distinct(&lower, "words")?;
    check(table.count != Some(0), || Error::new("no words are used").at("count"))?;
    let repeats = table.repeats.unwrap_or(1);
    check(repeats > 0, || Error::new("nothing is run").at("repeats").expected("1 or more"))?;
    Ok(Part {
        name: table.name,
        kind,
        prompts: table.prompts,
        words,
        sentences,
        single_token: table.single_token,
        count: table.count,
        places,
        doses,
        mode: table.mode,
        conditions,
        repeats,
        capture: table.capture,
        band,
        contrasts,
    })
}

pub(super) fn check_distinct<T: PartialEq + std::fmt::Debug>(
    values: &[T],
    field: &str,
) -> Result<()> {
    for (index, value) in values.iter().enumerate() {
        check(!values[..index].contains(value), || {
            Error::new("the same thing twice").at(field).got(format!("{value:?}"))
        })?;
    }
    Ok(())
}

fn kind(table: &PartTable) -> Result<Kind> {
    let probes = [("band", table.band.is_some()), ("contrasts", table.contrasts.is_some())];
    if table.kind != KindName::Probe
        && let Some((field, _)) = probes.iter().find(|(_, is_given)| *is_given)
    {
        return Err(Error::new("only parts of kind \"probe\" have it").at(*field));
    }
    if table.kind == KindName::Probe {
        let given = [("doses", table.doses.is_some()), ("conditions", table.conditions.is_some())];
        if let Some((field, _)) = given.iter().find(|(_, is_given)| *is_given) {
            return Err(Error::new("a probe injects nothing").at(*field).hint("remove the field"));
        }
    }
    if table.kind != KindName::Sample {
        let given = [
            ("max_tokens", table.max_tokens.is_some()),
            ("temperature", table.temperature.is_some()),
            ("top_p", table.top_p.is_some()),
            ("top_k", table.top_k.is_some()),
            ("repeats", table.repeats.is_some_and(|repeats| repeats != 1)),
        ];
        return match given.iter().find(|(_, is_given)| *is_given) {
            None if table.kind == KindName::Readout => Ok(Kind::Readout),
            None => Ok(Kind::Probe),
            Some((field, _)) => Err(Error::new("only a reply is drawn")
                .at(*field)
                .hint("remove the field, or make the part of kind \"sample\"")),
        };
    }
    let draw = Draw {
        temperature: table.temperature.unwrap_or(1.0),
        top_p: table.top_p.unwrap_or(1.0),
        top_k: table.top_k.unwrap_or(0),
        max_tokens: table.max_tokens.unwrap_or(100),
    };
    check(draw.temperature.is_finite() && draw.temperature >= 0.0, || {
        Error::new("not a temperature").at("temperature").expected("0 or more")
    })?;
    check(draw.top_p > 0.0 && draw.top_p <= 1.0, || {
        Error::new("not a probability").at("top_p").expected("above 0, at most 1").got(draw.top_p)
    })?;
    check(draw.max_tokens > 0, || Error::new("nothing is drawn").at("max_tokens"))?;
    Ok(Kind::Sample(draw))
}

fn places(depths: Option<Vec<f64>>, layers: Option<LayersField>) -> Result<Places> {
    match (depths, layers) {
        (Some(depths), None) => {
            check(!depths.is_empty() && depths.iter().all(|d| (0.0..=1.0).contains(d)), || {
                Error::new("not depths").at("depths").expected("fractions, 0 to 1")
            })?;
            check_distinct(&depths, "depths")?;
            Ok(Places::Depths(depths))
        }
        (None, Some(LayersField::List(layers))) => {
            check(!layers.is_empty(), || Error::new("no layers").at("layers"))?;
            check_distinct(&layers, "layers")?;
            Ok(Places::Layers(layers))
        }
        (None, Some(LayersField::All(All::All))) => Ok(Places::All),
        (None, Some(LayersField::Evenly(Evenly { evenly }))) => {
            check(evenly > 0, || Error::new("no layers").at("layers.evenly"))?;
            Ok(Places::Evenly(evenly))
        }
        _ => Err(Error::new("a part needs `depths` or `layers`, and not both")),
    }
}

/// Canonical order; clean partners are always run.
fn conditions(given: Option<Vec<Condition>>) -> Result<Vec<Condition>> {
    let given = given.unwrap_or_else(|| vec![Condition::Concept, Condition::Random]);
    check_distinct(&given, "conditions")?;
    check(!given.is_empty(), || Error::new("no conditions").at("conditions"))?;
    let used = |condition: &Condition| *condition == Condition::Clean || given.contains(condition);
    Ok(Condition::ALL.into_iter().filter(used).collect())
}

#[cfg(test)]
#[path = "protocol_file_tests.rs"]
mod tests;
