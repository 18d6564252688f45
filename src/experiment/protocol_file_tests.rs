use super::*;

const SMALL: &str = r#"
name = "small"
[prompts.ask]
turns = [{ role = "user", text = "Trial {trial}: anything?" }]
[[parts]]
name = "one"
kind = "sample"
prompts = ["ask"]
words = ["Bread", "Milk"]
depths = [0.5]
"#;

fn read(text: &str) -> Result<Protocol> {
    Protocol::parse(text, "small.toml", &[])
}

#[test]
fn defaults_are_written_out() {
    let protocol = read(SMALL).unwrap();
    let part = &protocol.parts[0];
    assert_eq!(part.doses, DOSES);
    assert_eq!(part.mode, StrengthMode::Reference);
    assert_eq!(part.conditions, [Condition::Clean, Condition::Concept, Condition::Random]);
    let draw = Draw { temperature: 1.0, top_p: 1.0, top_k: 0, max_tokens: 100 };
    assert_eq!((part.repeats, part.kind), (1, Kind::Sample(draw)));
    assert_eq!(protocol.vectors.template, "Tell me about {word}");
    assert_eq!(protocol.vectors.baseline.len(), 100);
    assert!(protocol.answers.yes.contains(&" yes".to_owned()));
    let prompt = &protocol.prompts["ask"];
    assert!(prompt.yes_no && prompt.trial == 1 && prompt.window == Window::default());
    assert!(!prompt.uses_word());
}

#[test]
fn layers_in_three_forms() {
    let with =
        |field: &str| read(&SMALL.replace("depths = [0.5]", field)).unwrap().parts[0].clone();
    assert_eq!(with("layers = [3, 5]").places, Places::Layers(vec![3, 5]));
    assert_eq!(with("layers = \"all\"").places, Places::All);
    assert_eq!(with("layers = { evenly = 16 }").places, Places::Evenly(16));
}

#[test]
fn mistakes_are_named() {
    let cases = [
        ("depths = [0.5]", "", "`depths` or `layers`"),
        ("depths = [0.5]", "depths = [0.5]\nlayers = [1]", "not both"),
        ("depths = [0.5]", "depths = [24]", "fractions"),
        ("depths = [0.5]", "depths = [0.5]\ndose = [1]", "unknown field `dose`"),
        ("depths = [0.5]", "depths = [0.5]\ndoses = [1, 1]", "twice"),
        ("depths = [0.5]", "depths = [0.5]\ndoses = [inf]", "finite"),
        ("depths = [0.5]", "depths = [0.5]\nrepeats = 0", "repeats"),
        ("depths = [0.5]", "depths = [0.5]\ntop_p = 1.5", "top_p"),
        ("depths = [0.5]", "depths = [0.5]\ntemperature = -1", "temperature"),
        ("depths = [0.5]", "depths = [0.5]\nconditions = [\"inverted\"]", "inverted"),
        ("\"Milk\"", "\"bread\"", "twice"),
        ("[\"ask\"]", "[\"asked\"]", "no such prompt"),
        ("kind = \"sample\"", "kind = \"readout\"\nmax_tokens = 5", "is drawn"),
        ("kind = \"sample\"", "kind = \"readout\"\nrepeats = 2", "is drawn"),
        ("{trial}", "{trail}", "{trail}"),
        ("anything?", "{question}", "neither"),
        ("[prompts.ask]", "[prompts.ask]\nquestion = \"Well?\"", "neither"),
        ("[prompts.ask]", "[prompts.ask]\nlike = \"ask\"", "like"),
        ("[prompts.ask]", "[prompts.ask]\nlike = \"none\"", "none"),
        ("[prompts.ask]", "[prompts.ask]\nanswer = \"maybe\"", "maybe"),
        ("[prompts.ask]", "[prompts.ask]\nanswer = \"no\"\nyes_no = false", "right answer"),
        ("role = \"user\"", "role = \"human\"", "human"),
        ("[\"Bread\", \"Milk\"]", "\"builtin:none\"", "no such word list"),
        ("name = \"small\"", "name = \" \"", "no name"),
        ("name = \"small\"", "name = \"small\"\nbudget_seconds = 0", "budget_seconds"),
        ("name = \"small\"", "name = \"small\"\ncuts = []", "cuts"),
        ("[prompts.ask]", "[vectors]\ntemplate = \"Tell me\"\n[prompts.ask]", "{word}"),
    ];
    for (old, new, want) in cases {
        assert!(SMALL.contains(old), "{old}");
        let error = read(&SMALL.replacen(old, new, 1)).unwrap_err().to_string();
        assert!(error.contains(want) && error.contains("small.toml"), "{new}: {error}");
    }
    let twice = format!(
        "{SMALL}{}",
        SMALL.split_once("[[parts]]").map(|s| format!("[[parts]]{}", s.1)).unwrap()
    );
    assert!(read(&twice).unwrap_err().to_string().contains("two parts"));
}

#[test]
fn a_prompt_like_another_asks_another_question() {
    let asks = SMALL
        .replace("anything?", "{question}")
        .replace(
            "[prompts.ask]",
            r#"[prompts.ask]
        question = "Anything?"
        trial = 3
        window = { from = { start_of = { text = "{question}", turn = "user.last" } } }"#,
        )
        .replace(
            "[[parts]]",
            r#"[prompts.sun]
        like = "ask"
        question = "Is the {word} cold?"
        answer = "no"
        [[parts]]"#,
        );
    let prompts = read(&asks).unwrap().prompts;
    let (ask, sun) = (&prompts["ask"], &prompts["sun"]);
    assert_eq!(ask.turns[0].content, "Trial {trial}: Anything?");
    assert_eq!(sun.turns[0].content, "Trial {trial}: Is the {word} cold?");
    assert_eq!((ask.answer, sun.answer), (None, Some(Answer::No)));
    assert_eq!((sun.trial, sun.yes_no), (3, true));
    let window = serde_json::to_string(&sun.window).unwrap();
    assert!(window.contains("Is the {word} cold?"), "{window}");
    assert!(sun.uses_word() && !ask.uses_word());
}

#[test]
fn fields_are_set_from_outside() {
    let with = |settings: &[&str]| {
        let settings: Vec<Setting> = settings.iter().map(|text| text.parse().unwrap()).collect();
        Protocol::parse(SMALL, "small.toml", &settings)
    };
    let protocol = with(&[
        "seed=7",
        "parts.one.count = 1",
        "parts.0.doses=[0.5, 2]",
        "vectors.template=x",
        "prompts.ask.turns.0.text=Well = {trial}?",
    ]);
    assert!(
        protocol.unwrap_err().to_string().contains("vectors"),
        "there is no such table to set in"
    );
    let protocol = with(&[
        "seed=7",
        "parts.one.count = 1",
        "parts.0.doses=[0.5, 2]",
        "vectors={ template = \"On {word}\" }",
        "prompts.ask.turns.0.text=Well = {trial}?",
    ])
    .unwrap();
    assert_eq!((protocol.seed, protocol.parts[0].count), (7, Some(1)));
    assert_eq!(protocol.parts[0].doses, [0.5, 2.0]);
    assert_eq!(protocol.vectors.template, "On {word}");
    assert_eq!(protocol.prompts["ask"].turns[0].content, "Well = {trial}?");
    for (setting, want) in [
        ("parts.two.count=1", "two"),
        ("parts.one.cuont=1", "cuont"),
        ("parts.9.count=1", "9"),
        ("name.x=1", "name"),
        ("parts.one.count=many", "many"),
    ] {
        let error = with(&[setting]).unwrap_err().to_string();
        assert!(error.contains(want) && error.contains("small.toml"), "{setting}: {error}");
    }
    assert!("seed".parse::<Setting>().is_err() && "=1".parse::<Setting>().is_err());
}

#[test]
fn braces_that_are_no_placeholder_are_text() {
    let protocol = read(&SMALL.replace("anything?", "answer as {\\\"a\\\": 1} or {}")).unwrap();
    assert!(protocol.prompts["ask"].turns[0].content.contains("{\"a\": 1} or {}"));
}

/// The schema that editors take from `experiments/protocol.schema.json`; `INKLING_WRITE_SCHEMA=1` writes it.
#[test]
fn the_schema_in_the_repository_is_that_of_the_code() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/experiments/protocol.schema.json");
    let schema = schemars::schema_for!(File);
    let text = serde_json::to_string_pretty(&schema).unwrap() + "\n";
    if std::env::var_os("INKLING_WRITE_SCHEMA").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    let stored = std::fs::read_to_string(path).unwrap();
    assert!(stored == text, "{path} is not the schema: run this test with INKLING_WRITE_SCHEMA=1");
    let schema: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(schema["additionalProperties"], false, "strict");
}

#[test]
fn judges_and_tables_are_named() {
    assert_eq!(read(SMALL).unwrap().judges, [JudgePlan::Rules]);
    let more = "name = \"small\"\ntables = [\"replies\", \"explore\"]\njudges = [{ kind = \"rules\" }, \
                { kind = \"http\", url = \"http://127.0.0.1/v1\", name = \"m\", key_env = \"KEY\" }]";
    let protocol = read(&SMALL.replacen("name = \"small\"", more, 1)).unwrap();
    assert_eq!(protocol.tables, [Table::Replies, Table::Explore]);
    let JudgePlan::Http { key_env, questions, .. } = &protocol.judges[1] else { panic!("http") };
    assert_eq!((key_env.as_deref(), questions), (Some("KEY"), &None));
    for model in ["org/name@v1", "judge.gguf"] {
        let field =
            format!("name = \"small\"\njudges = [{{ kind = \"local\", model = \"{model}\" }}]");
        let text = SMALL.replacen("name = \"small\"", &field, 1);
        let protocol = Protocol::parse(&text, "folder/small.toml", &[]).unwrap();
        let JudgePlan::Local { model: found, .. } = &protocol.judges[0] else { panic!("local") };
        let want = if model.contains('@') { model.into() } else { Path::new("folder").join(model) };
        assert_eq!(*found, want, "files stand beside the protocol, the hub does not");
    }
    for (field, want) in [
        ("judges = [{ kind = \"oracle\" }]", "oracle"),
        ("judges = [{ kind = \"http\", url = \"u\" }]", "name"),
        ("judges = [{ kind = \"http\", url = \"http://me:pw@h/v1\", name = \"m\" }]", "URL"),
        ("judges = [{ kind = \"http\", url = \"u\", name = \"m\", key = \"secret\" }]", "key"),
        ("tables = [\"plots\"]", "plots"),
    ] {
        let text = SMALL.replacen("name = \"small\"", &format!("name = \"small\"\n{field}"), 1);
        let error = read(&text).unwrap_err().to_string();
        assert!(error.contains(want), "{field}: {error}");
    }
}

#[test]
fn recipes_come_with_what_they_need() {
    let with = |table: &str| {
        read(&SMALL.replacen("[prompts.ask]", &format!("[vectors]\n{table}\n[prompts.ask]"), 1))
    };
    let pairs = "pairs = [[\"I love {word}.\", \"I love it.\"]]";
    let vectors =
        with(&format!("recipe = \"pca\"\nsite = \"resid_mid\"\n{pairs}")).unwrap().vectors;
    assert_eq!(
        (vectors.recipe, vectors.site, vectors.pairs.len()),
        (Recipe::Pca, Site::ResidMid, 1)
    );
    let file = with("recipe = \"file\"\nfile = \"mine.npy\"").unwrap().vectors.file;
    assert_eq!(file.as_deref(), Some(Path::new("mine.npy")), "beside the protocol");
    for (table, want) in [
        ("recipe = \"pca\"", "pairs"),
        (pairs, "pairs"),
        ("recipe = \"contrast\"\npairs = [[\"with\", \"without\"]]", "name the word"),
        ("recipe = \"file\"", "file"),
        ("file = \"x\"", "file"),
        ("recipe = \"magic\"", "magic"),
        ("site = \"mlp_out\"", "mlp_out"),
    ] {
        let error = with(table).unwrap_err().to_string();
        assert!(error.contains(want), "{table}: {error}");
    }
}
