//! Requests from a JSONL file, standard input or the command line.

use std::{
    collections::{BTreeSet, HashMap},
    io::Read,
    path::{Path, PathBuf},
};

use clap::Args;
use fs_err as fs;

use super::output::note;
use crate::{
    captures::Item,
    engine::{
        Engine,
        patching::{self, Patched},
        point,
        resolve::{Resolved, resolve},
        vectors::VectorFiles,
    },
    error::{Context, Error, Result},
    model::Model,
    request::{Injection, Message, Request, Sampling, VectorRef},
};

/// Where requests come from.
#[derive(Args)]
pub struct RequestArgs {
    /// Requests, one JSON object a line; - is standard input
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "prompt",
        required_unless_present = "prompt"
    )]
    pub input: Option<PathBuf>,
    /// One request: what the user says
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// With --prompt: the system message
    #[arg(long, value_name = "TEXT", conflicts_with = "input")]
    pub system: Option<String>,
    /// With --prompt: FILE#NAME@LAYER*STRENGTH, over the whole sequence; may be repeated
    #[arg(long, value_name = "INJECTION", conflicts_with = "input", value_parser = parse_injection)]
    pub inject: Vec<Injection>,
}

/// Requests in order, and where each stands.
pub struct Requests {
    /// Non-empty, with unique ids.
    pub list: Vec<Request>,
    places: Vec<String>,
    /// The folder that vector files are named from.
    base: PathBuf,
}

impl RequestArgs {
    /// Those of a command that takes a file only.
    pub fn of_file(input: Option<PathBuf>) -> Self {
        Self { input, prompt: None, system: None, inject: Vec::new() }
    }

    /// Reads all requests.
    pub fn load(&self) -> Result<Requests> {
        match (&self.prompt, &self.input) {
            (Some(prompt), _) => Ok(self.of_prompt(prompt)),
            (None, Some(file)) if file == Path::new("-") => {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text).at(|| "standard input".into())?;
                Requests::parse(&text, "standard input", PathBuf::new())
            }
            (None, Some(file)) => {
                let base = file.parent().unwrap_or(Path::new("")).to_owned();
                Requests::parse(&fs::read_to_string(file)?, &file.display().to_string(), base)
            }
            (None, None) => Err(Error::new("no requests").hint("give --input or --prompt")),
        }
    }

    fn of_prompt(&self, prompt: &str) -> Requests {
        let request = Request {
            id: "prompt".into(),
            messages: Some(vec![Message { role: "user".into(), content: prompt.into() }]),
            system: self.system.clone(),
            inject: self.inject.clone(),
            n: 1,
            ..Request::default()
        };
        Requests { list: vec![request], places: vec!["--prompt".into()], base: PathBuf::new() }
    }
}

impl Requests {
    pub(crate) fn parse(text: &str, origin: &str, base: PathBuf) -> Result<Self> {
        let mut list = Vec::new();
        let mut places = Vec::new();
        let mut seen = HashMap::new();
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        for (index, line) in lines {
            let number = index + 1;
            let place = format!("{origin}, line {number}");
            let request: Request =
                serde_json::from_str(line).map_err(|error| malformed(&error).at(&place))?;
            if request.id.is_empty() {
                return Err(Error::new("empty id").at("id").at(place));
            }
            if let Some(before) = seen.insert(request.id.clone(), number) {
                return Err(Error::new("two requests of one id")
                    .at("id")
                    .at(place)
                    .got(format!("{:?}, which line {before} has too", request.id)));
            }
            list.push(request);
            places.push(place);
        }
        if list.is_empty() {
            return Err(Error::new("no requests").at(origin).expected("one JSON object a line"));
        }
        Ok(Self { list, places, base })
    }

    /// Requests that were not written as such, and where each stands.
    pub fn of(list: Vec<Request>, places: Vec<String>, base: PathBuf) -> Self {
        Self { list, places, base }
    }

    /// Where a request stands, for messages.
    pub fn place(&self, index: usize) -> String {
        format!("{}, request {:?}", self.places[index], self.list[index].id)
    }

    /// Says what the names of points are that requests have.
    fn explain_hooks(&self, model: &Model) {
        let of = |request: &Request| {
            let inject = request.inject.iter().filter_map(|injection| injection.hook.clone());
            inject
                .chain(request.capture.iter().filter_map(|capture| capture.hook.clone()))
                .collect()
        };
        let names: BTreeSet<String> = self.list.iter().flat_map::<Vec<_>, _>(of).collect();
        for name in names {
            // What is no name is refused with its request.
            if let Ok(point) = point(&name, &model.config)
                && point.to_string() != name
            {
                note(format!("{name} is {point}"));
            }
        }
    }

    /// Checks all requests against the model.
    pub fn resolve(&self, model: &Model) -> Result<Checked> {
        let mut files = VectorFiles::new(&self.base);
        self.explain_hooks(model);
        let one = |(index, request): (usize, &Request)| {
            let resolved = resolve(request, model, &mut files).at(|| self.place(index))?;
            let Resolved { prompt, job, readings, patches } = resolved;
            Ok(Patched { id: request.id.clone(), prompt, job, readings, patches })
        };
        let mut list = self.list.iter().enumerate().map(one).collect::<Result<Vec<_>>>()?;
        let plan = patching::Plan::new(&mut list, &model.config)?;
        Ok(Checked { list, plan })
    }
}

/// What says how the prompt is continued has no part in a forward pass.
pub fn without_generation(request: &mut Request) {
    request.sampling = Sampling { max_tokens: 0, ..Sampling::default() };
    request.n = 1;
    request.stop.clear();
    request.logprobs = None;
    request.score.clear();
}

/// Requests that were checked against the model.
pub struct Checked {
    /// In the order of the file.
    pub list: Vec<Patched>,
    plan: patching::Plan,
}

impl Checked {
    /// What the engine runs; rows of others are zeros still.
    pub fn items(&self) -> Vec<Item> {
        let item = |one: &Patched| Item {
            id: one.id.clone(),
            job: one.job.clone(),
            readings: one.readings.clone(),
        };
        self.list.iter().map(item).collect()
    }

    /// What the engine runs, after it has run what others take rows from.
    pub fn fill(mut self, engine: &Engine) -> Result<Vec<Item>> {
        self.plan.fill(engine, &mut self.list)?;
        Ok(self.items())
    }
}

/// What may stand in a field that has several forms; serde only names the type.
const FORMS: [(&str, &str); 9] = [
    ("VectorRef", "\"FILE#NAME\", {\"FILE#NAME\": weight, ...} or a list of numbers"),
    (
        "Position",
        "a token index, \"prompt_end\", {\"generated\": N}, {\"start_of\": SPAN} or {\"end_of\": SPAN}",
    ),
    ("Windows", WINDOWS),
    ("Window", WINDOWS),
    ("OneOrMany", "a layer, a list of layers, {\"first\": L, \"last\": L} or \"all\""),
    ("Turn", "an index or \"ROLE.first\", \"ROLE.last\", \"ROLE.N\""),
    ("Layers", "a list of layers or \"all\""),
    ("Positions", "a list of positions, \"all\" or \"last\""),
    ("Continuation", "text or a list of token ids"),
];

const WINDOWS: &str = "\"all\", \"prompt\", \"generated\", \"last\", {\"role\": ROLE}, {\"turn\": TURN}, \
    {\"at\": POSITION}, {\"from\": POSITION, \"to\": POSITION, \"every\": N}, or a list of such";

fn malformed(error: &serde_json::Error) -> Error {
    let message = error.to_string();
    let (message, _) = message.rsplit_once(" at line ").unwrap_or((&message, ""));
    let name = message.strip_prefix("data did not match any variant of untagged enum ");
    let form = name.and_then(|name| FORMS.iter().find(|(known, _)| *known == name));
    let place = format!("column {}", error.column());
    let out = Error::new("malformed request").at(place);
    match form {
        Some((_, form)) => out.expected(form).got("something else, ending at this column"),
        None => out.got(message),
    }
}

/// `FILE#NAME@LAYER*STRENGTH`.
fn parse_injection(text: &str) -> std::result::Result<Injection, String> {
    let parts = text.rsplit_once('*').and_then(|(rest, strength)| {
        let (vector, layer) = rest.rsplit_once('@')?;
        Some((vector, layer.parse().ok()?, strength.parse().ok()?))
    });
    let (vector, layer, strength) =
        parts.ok_or("expected FILE#NAME@LAYER*STRENGTH, e.g. set.safetensors#ocean@20*4")?;
    Ok(Injection::add(VectorRef::Named(vector.to_owned()), layer, strength))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn injections_in_short() {
        let injection = parse_injection("sets/a#1.safetensors#ocean@20*-4.5").unwrap();
        let vector = VectorRef::Named("sets/a#1.safetensors#ocean".into());
        assert_eq!(injection, Injection::add(vector, 20, -4.5));
        for bad in ["", "a#b", "a#b@20", "a#b*4", "a#b@x*4", "a#b@-1*4", "a#b@20*much"] {
            assert!(parse_injection(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn lines_are_checked() {
        let parse = |text: &str| {
            Requests::parse(text, "r.jsonl", PathBuf::new()).map_err(|error| error.to_string())
        };
        let good = "{\"id\": \"a\", \"tokens\": [1]}\n\n{\"id\": \"b\", \"tokens\": [2]}\n";
        let requests = parse(good).unwrap();
        assert_eq!(requests.list.len(), 2);
        assert_eq!(requests.place(1), "r.jsonl, line 3, request \"b\"");
        let refused = |text: &str, want: &[&str]| {
            let error = parse(text).err().expect("an error");
            for want in want {
                assert!(error.contains(want), "{want:?} not in {error}");
            }
        };
        refused("\n \n", &["no requests", "r.jsonl"]);
        refused(&good.replace('b', "a"), &["r.jsonl, line 3", "two requests", "line 1"]);
        refused(&good.replace("\"b\"", "\"\""), &["r.jsonl, line 3", "empty id"]);
        refused("{\"id\": \"a\", \"token\": [1]}", &["line 1", "column", "token"]);
        let inject =
            r#"{"id": "a", "tokens": [1], "inject": [{"vector": 1, "layer": 0, "strength": 1}]}"#;
        refused(inject, &["line 1", "FILE#NAME"]);
        let with = |field: &str| {
            format!(
                r#"{{"id": "a", "tokens": [1], "inject": [{{"op": "scale", "strength": 0, {field}}}]}}"#
            )
        };
        refused(&with(r#""layer": "some""#), &["line 1", "a list of layers, {\"first\": L"]);
        // Neither a list of positions nor a range: which of both was meant?
        refused(&with(r#""layer": 0, "window": [1, 2]"#), &["line 1", "{\"at\": POSITION}"]);
        refused(&with(r#""layer": 0, "from": [3]"#), &["line 1", "{\"generated\": N}"]);
        refused("{\"id\"", &["r.jsonl, line 1", "malformed"]);
    }
}
