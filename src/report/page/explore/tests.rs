//! The data's coding, and the page in a real browser under its own policy.

mod browser;
mod sample;

use std::collections::BTreeMap;

use serde_json::{Value, json};

use self::{
    browser::{Clock, Policy, browse},
    sample::{Owned, rows},
};
use super::*;

/// The most that a page of [`MANY`] replies may take.
const BYTES: usize = 20_000_000;
const OPEN_MS: f64 = 2_000.0;
const ACTION_MS: f64 = 100.0;
const MANY: usize = 20_000;

/// Signs that could end a tag, an attribute or a string.
const HOSTILE: [&str; 6] = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)><!--<script>",
    "\"' onclick=alert(1) javascript:alert(1) &lt;b&gt; \\u003cscript\\u003e {{1}} ${alert(1)}",
    "right \u{202e}tfel\u{202c} \u{2066}x\u{2069} \u{200e}\u{200f} \u{0}\u{7}\u{1b}[31m\r\u{85}",
    "line\u{2028}paragraph\u{2029}\u{feff}\u{fffe} İstanbul ẞ 🦀 \u{1f468}\u{200d}\u{1f469}",
    "",
];

#[expect(clippy::unnecessary_wraps, reason = "as html takes it")]
fn prompt(row: &Row) -> Option<Prompt> {
    Some(Prompt {
        before: "I can inject thoughts. ".repeat(50),
        window: "Do you detect one?".into(),
        after: "\nAssistant: ".into(),
        into_reply: row.prompt == "cued",
    })
}

/// A page around the section.
fn page(body: &str) -> String {
    let policy =
        format!("default-src 'none'; style-src 'unsafe-inline'; script-src {}", script_hash());
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta \
         http-equiv=\"Content-Security-Policy\" content=\"{policy}\">\n<title>Replies</title>\n\
         <style>{}</style>\n</head>\n<body>\n<section id=\"explore\">{body}</section>\n\
         <section id=\"transcripts\">below</section>\n</body>\n</html>\n",
        include_str!("../explore.css")
    )
}

fn page_of(rows: &[Owned]) -> String {
    page(&html(&rows.iter().map(Owned::row).collect::<Vec<_>>(), prompt))
}

fn plain<'a>(id: &'a str, condition: &'a str, dose: Option<f64>) -> Row<'a> {
    Row {
        id,
        part: "part",
        prompt: "cued",
        condition,
        concept: "Bread",
        other: "",
        sentence: "",
        layer: None,
        dose,
        repeat: 0,
        text: "a reply",
        cut: false,
        verdicts: Vec::new(),
        success: None,
    }
}

#[test]
fn no_rows_no_section() {
    assert_eq!(html(&[], |_| None), "");
}

#[test]
fn base64_is_rfc_4648() {
    for (plain, coded) in [
        ("", ""),
        ("f", "Zg=="),
        ("fo", "Zm8="),
        ("foo", "Zm9v"),
        ("foob", "Zm9vYg=="),
        ("fooba", "Zm9vYmE="),
        ("foobar", "Zm9vYmFy"),
    ] {
        assert_eq!(base64(plain.as_bytes()), coded);
    }
    assert_eq!(base64(&[0xfb, 0xff, 0xbf]), "+/+/");
}

/// The example of the CSP specification.
#[test]
fn hashes_are_source_expressions() {
    assert_eq!(
        source_hash("alert('Hello, world.');"),
        "'sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng='"
    );
    let page = page_of(&rows(3));
    assert!(page.contains(&format!("<script>{SCRIPT}</script>")));
    // What a parser would change or stop at.
    for sign in ["</script", "<!--", "<script", "\r", "\0"] {
        assert!(!SCRIPT.to_lowercase().contains(sign), "{sign:?}");
    }
    for name in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
        assert!(!SCRIPT.contains(name), "{name}");
    }
}

#[test]
fn no_text_breaks_out_of_the_data() {
    let all = HOSTILE.concat();
    let row = Row { text: &all, concept: &all, ..plain(&all, "clean", None) };
    let json = embeddable(&data(&[row], |_| None));
    assert!(!json.contains(['<', '>', '&', '\u{2028}', '\u{2029}', '\u{202e}', '\u{1b}']));
    let back: Value = serde_json::from_str(&json).unwrap();
    let text = back["strings"][back["text"][0].as_u64().unwrap() as usize].as_str().unwrap();
    assert_eq!(text, visible(all.trim()));
    assert!(text.contains("</script><script>alert(1)</script><img src=x"));
    assert!(text.contains("right ⟨U+202E⟩tfel⟨U+202C⟩ ⟨U+2066⟩x⟨U+2069⟩ ⟨U+200E⟩⟨U+200F⟩ "));
    assert!(text.contains("\u{fffd}\u{fffd}\u{fffd}[31m\u{fffd}\u{fffd}"));
}

#[test]
fn texts_are_stored_once_and_come_back() {
    let owned = rows(500);
    let rows: Vec<_> = owned.iter().map(Owned::row).collect();
    let data = data(&rows, prompt);
    assert_eq!(data.strings[0], "");
    let distinct: std::collections::HashSet<_> = data.strings.iter().collect();
    assert_eq!(distinct.len(), data.strings.len());
    assert_eq!(data.contexts.len(), 2, "cued and open");
    let of = |place: usize| data.strings[place].as_str();
    for (place, at) in order(&rows).into_iter().enumerate() {
        let row = &rows[at];
        assert_eq!(data.id[place], row.id);
        assert_eq!(of(data.prompt[place]), format!("{} / {}", row.part, row.prompt));
        assert_eq!(of(data.condition[place]), row.condition);
        assert_eq!(of(data.concept[place]), row.concept);
        assert_eq!(of(data.other[place]), row.other);
        assert_eq!(of(data.sentence[place]), row.sentence);
        assert_eq!(of(data.text[place]), row.text.trim());
        assert_eq!((data.layer[place], data.dose[place]), (row.layer, row.dose));
        assert_eq!(data.success.as_bytes()[place] == b'1', row.success == Some(true));
        for (column, (name, yes, evidence)) in data.verdicts.iter().zip(&row.verdicts) {
            assert_eq!(column.name, *name);
            assert_eq!(column.answers.as_bytes()[place] == b'1', *yes);
            assert_eq!(of(column.evidence[place]), *evidence);
        }
        let (before, window, after, through) = data.contexts[data.context[place].unwrap()];
        let prompt = prompt(row).unwrap();
        assert!(of(before).starts_with('…') && prompt.before.ends_with(&of(before)[3..]));
        assert_eq!(of(before).chars().count(), TAIL + 1);
        assert_eq!((of(window), of(after)), (prompt.window.as_str(), prompt.after.as_str()));
        assert_eq!(through, prompt.into_reply);
    }
}

#[test]
fn verdicts_that_were_not_given_stay_open() {
    let given = |verdicts| Row { verdicts, ..plain("id", "clean", None) };
    let rows = [
        Row { id: "a", success: Some(false), ..given(vec![("claims", true, "\"yes\"")]) },
        Row { id: "b", cut: true, ..given(vec![("repeats", false, "no"), ("claims", false, "")]) },
    ];
    let data = data(&rows, |_| None);
    let at = |id: &str| data.id.iter().position(|own| own == id).unwrap();
    let names: Vec<_> = data.verdicts.iter().map(|column| column.name.as_str()).collect();
    assert_eq!(names, ["claims", "repeats"]);
    let sign = |text: &str, id: &str| text.as_bytes()[at(id)] as char;
    assert_eq!(
        [sign(&data.verdicts[0].answers, "a"), sign(&data.verdicts[0].answers, "b")],
        ['1', '0']
    );
    assert_eq!(
        [sign(&data.verdicts[1].answers, "a"), sign(&data.verdicts[1].answers, "b")],
        ['-', '0']
    );
    assert_eq!([sign(&data.success, "a"), sign(&data.success, "b")], ['0', '-']);
    assert_eq!([sign(&data.cut, "a"), sign(&data.cut, "b")], ['0', '1']);
    assert_eq!(data.context, [None, None]);
}

#[test]
fn the_first_rows_are_one_of_each_condition_and_dose() {
    let ids: Vec<_> = (0..90).map(|at| format!("trial {at}")).collect();
    let rows: Vec<_> = ids
        .iter()
        .enumerate()
        .map(|(at, id)| match at % 9 {
            0 => plain(id, "clean", None),
            1..=3 => plain(id, "random", Some(f64::from(at as u32 % 9) / 2.0)),
            _ => plain(id, "concept", Some([2.0, 0.125][at % 2])),
        })
        .collect();
    let drawn = |rows: &[Row]| -> Vec<_> {
        let stratum = |row: &Row| (row.condition.to_owned(), row.dose, row.id.to_owned());
        order(rows).into_iter().map(|at| stratum(&rows[at])).collect()
    };
    let first = drawn(&rows);
    let strata = [
        ("clean", None),
        ("concept", Some(0.125)),
        ("concept", Some(2.0)),
        ("random", Some(0.5)),
        ("random", Some(1.0)),
        ("random", Some(1.5)),
    ];
    for round in first[..60].chunks(6) {
        let round: Vec<_> = round.iter().map(|(name, dose, _)| (name.as_str(), *dose)).collect();
        assert_eq!(round, strata);
    }
    assert!(first[60..].iter().all(|(name, ..)| name == "concept"));
    let reversed: Vec<_> = rows.into_iter().rev().collect();
    assert_eq!(drawn(&reversed), first, "the order of the lines does not matter");
}

#[test]
fn a_tail_is_cut_between_characters() {
    assert_eq!(tail("short"), "short");
    assert_eq!(tail(&"é".repeat(TAIL)), "é".repeat(TAIL));
    assert_eq!(tail(&"é".repeat(TAIL + 2)), format!("…{}", "é".repeat(TAIL)));
}

/// Whether a row is shown, by another way than the script's.
fn passes(row: &Owned, query: &str, chosen: &BTreeMap<&str, &str>) -> bool {
    let answer = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    let texts = [&row.text, &row.concept, &row.other, &row.sentence].into_iter();
    let mut texts = texts.chain(row.verdicts.iter().map(|verdict| &verdict.2));
    let holds = texts.any(|text| text.to_lowercase().contains(&query.to_lowercase()));
    holds
        && chosen.iter().all(|(name, wanted)| {
            let own = match *name {
                "prompt" => format!("sampled / {}", row.prompt),
                "condition" => row.condition.into(),
                "layer" => row.layer.map_or(String::new(), |layer| layer.to_string()),
                "dose" => row.dose.map_or(String::new(), |dose| dose.to_string()),
                "concept" => row.concept.clone(),
                "success" => answer(row.success == Some(true)),
                name => {
                    let name = name.replace(' ', "_");
                    answer(row.verdicts.iter().find(|verdict| verdict.0 == name).unwrap().1)
                }
            };
            own == *wanted
        })
}

/// `(successes of replies)` under concept vectors and of the same concepts' clean replies, among
/// the rows that pass the filters.
fn shares(rows: &[Owned], query: &str, chosen: &BTreeMap<&str, &str>) -> [String; 2] {
    let of = |condition: &str, aside: &[&str]| -> Vec<&Owned> {
        let mut own = chosen.clone();
        own.retain(|name, _| !aside.contains(name));
        let all = rows.iter().filter(|row| row.condition == condition);
        all.filter(|row| passes(row, query, &own)).collect()
    };
    let concept = of("concept", &["condition", "success"]);
    let mut clean = of("clean", &["condition", "success", "layer", "dose"]);
    clean.retain(|row| concept.iter().any(|other| other.concept == row.concept));
    [concept, clean].map(|rows| {
        let yes = rows.iter().filter(|row| row.success == Some(true)).count();
        if rows.is_empty() { "–".into() } else { format!("({yes} of {})", rows.len()) }
    })
}

#[test]
fn filters_dots_and_links_do_what_they_say() {
    let rows = rows(900);
    let steps: Vec<(&str, BTreeMap<&str, &str>)> = vec![
        ("", BTreeMap::new()),
        ("CONCEPT07", BTreeMap::new()),
        ("number 7 was", BTreeMap::new()),
        ("nothing holds this", BTreeMap::new()),
        ("nats, at most", [("claims then names", "no")].into()),
        ("", [("condition", "concept"), ("prompt", "sampled / open")].into()),
        ("notice", [("condition", "other"), ("dose", "0.125"), ("mentions", "yes")].into()),
        ("", [("layer", "0"), ("success", "no"), ("prompt", "sampled / open")].into()),
        ("is", [("concept", "Concept31"), ("claims", "yes"), ("coherent", "yes")].into()),
        ("", [("layer", "12"), ("dose", "2"), ("prompt", "sampled / cued")].into()),
    ];
    let given: Vec<_> =
        steps.iter().map(|(query, chosen)| json!({"query": query, "chosen": chosen})).collect();
    let script = format!("const STEPS = {};\n{}", json!(given), include_str!("tests/behaviour.js"));
    let seen = browse(&page_of(&rows), &script, Clock::Virtual, Policy::Own);
    assert_eq!(seen["alarms"], json!([]));
    let seen = &seen["result"];

    assert_eq!(seen["start"], json!(["900 of 900 replies", 50, "Show 50 more", true]));
    assert_eq!(seen["conditions"], json!(["", "clean", "concept", "random", "other", "after"]));
    assert_eq!(seen["doses"], json!(["", "0.125", "0.25", "0.5", "1", "2"]));
    let first = ["clean", "concept", "concept", "concept", "concept", "concept"];
    assert_eq!(seen["first"], json!(first.map(|name| format!("reply {name}"))));

    for ((query, chosen), seen) in steps.iter().zip(seen["counts"].as_array().unwrap()) {
        let count = rows.iter().filter(|row| passes(row, query, chosen)).count();
        assert_eq!(seen[0], format!("{count} of 900 replies"), "{query:?} {chosen:?}");
        if count == 0 || chosen.contains_key("concept") {
            continue;
        }
        let mut chosen = chosen.clone();
        chosen.entry("prompt").or_insert("sampled / cued");
        let [concept, clean] = shares(&rows, query, &chosen);
        let rates = seen[1].as_str().unwrap();
        let start = format!("{}, success by concept: ", chosen["prompt"]);
        assert!(rates.starts_with(&start), "{rates}");
        assert!(rates.contains(&format!("{concept} under the concept’s vector, ")), "{rates}");
        assert!(rates.ends_with(&format!("{clean} clean.")), "{rates} {clean}");
    }

    assert_eq!(seen["marks"], json!([true, true]));
    assert_eq!(seen["more"], json!([100, true]));
    // Open: expanded, with the focus, window injected or only shown, reply injected, lines, evidence.
    let window = "Do you detect one?";
    let of_concept = json!(["true", true, window, null, true, 4, true, "false", null]);
    let of_clean = json!(["true", true, null, window, false, 4, true, "false", null]);
    let opened = |at: usize| {
        let mut opened = seen["opened"][at].clone();
        // A success has a line more.
        opened[5] = json!(opened[5].as_u64().unwrap().min(4));
        opened
    };
    assert_eq!([opened(0), opened(1)], [of_concept, of_clean]);

    assert_eq!(seen["saved"], "#explore?condition=clean&q=a+b");
    let clean = rows.iter().filter(|row| row.condition == "clean");
    let both = clean.clone().filter(|row| passes(row, "a b", &BTreeMap::new())).count();
    assert_eq!(seen["elsewhere"], json!([format!("{both} of 900 replies"), "#transcripts"]));
    assert_eq!(seen["reset"], "#transcripts", "others' anchors are left alone");
    assert_eq!(seen["loaded"], json!([format!("{} of 900 replies", clean.count()), "clean", ""]));
    assert_eq!(seen["end"], "#explore");

    let titles: Vec<_> =
        seen["titles"].as_array().unwrap().iter().map(|title| title.as_str().unwrap()).collect();
    let shares: Vec<f64> = titles
        .iter()
        .map(|title| title.split_once(": ").unwrap().1.split_once('%').unwrap().0.parse().unwrap())
        .collect();
    assert!(titles.len() > 40 && shares.is_sorted_by(|a, b| a >= b), "{titles:?}");
    let third = titles[2].split_once(": ").unwrap().0;
    assert_eq!(seen["chosen"], json!([third, 1]));
}

#[test]
fn hostile_replies_stay_text() {
    let huge = "huge <b> ".repeat(250_000);
    let blank = " \n".repeat(5_000_000);
    let mut rows = Vec::new();
    for text in HOSTILE.into_iter().chain([huge.as_str(), blank.as_str()]) {
        let name = &text[..text.len().min(200)];
        rows.push(Row {
            part: name,
            prompt: name,
            concept: name,
            other: name,
            sentence: name,
            text,
            verdicts: vec![("claims", true, name), (HOSTILE[1], true, name)],
            ..plain(text.get(..40).unwrap_or(text), "concept", Some(1.0))
        });
    }
    let hostile = |row: &Row| {
        let text = row.concept.to_owned();
        Some(Prompt { before: text.clone(), window: text.clone(), after: text, into_reply: true })
    };
    // On its own, where nothing beside it can mend what it breaks.
    let one = page(&html(&rows[..1], hostile));
    let seen = browse(&one, "finish(cards()[0].textContent);", Clock::Real, Policy::None);
    assert!(seen["result"].as_str().unwrap().contains(HOSTILE[0]), "{seen}");
    assert_eq!(seen["alarms"], json!([]));
    let page = page(&html(&rows, hostile));
    for policy in [Policy::Own, Policy::None] {
        let seen = browse(&page, include_str!("tests/hostile.js"), Clock::Virtual, policy);
        assert_eq!(seen["alarms"], json!([]));
        let seen = &seen["result"];
        assert_eq!(seen["elements"], 0);
        assert_eq!(seen["scripts"], 4, "the data, the page's and the tests' two");
        assert!(seen["links"].as_array().unwrap().iter().all(|link| link == "file:"), "{seen}");
        assert_eq!(seen["found"], HOSTILE.iter().filter(|text| text.contains("script")).count());
        // The second stands behind a letter that is longer in lower case.
        let marks = json!([[true, ["<img src=x onerror=alert(1)>"]], [true, ["🦀"]]]);
        assert_eq!(seen["marks"], marks);
        let all = |name: &str| seen[name].as_array().unwrap().clone();
        for text in &HOSTILE[..5] {
            let want = visible(text.trim());
            let holds = |shown: &Value| shown.as_str().unwrap().matches(&want).count() >= 4;
            assert!(all("closed").iter().any(holds), "{want}");
            assert!(all("open").iter().any(holds), "{want}");
        }
        let empty =
            all("closed").iter().filter(|t| t.as_str().unwrap().contains("(empty)")).count();
        assert_eq!(empty, 2);
        assert!(all("lengths").contains(&json!(huge.trim().len())), "{}", seen["lengths"]);
    }
}

#[test]
fn a_script_with_another_hash_does_not_run() {
    let page = page_of(&rows(30));
    let script = "sleep(100).then(() => finish([part('app').hidden, cards().length]));";
    let seen = browse(&page, script, Clock::Virtual, Policy::Own);
    assert_eq!(seen, json!({"alarms": [], "result": [false, 30]}));
    let changed = page.replacen(&SCRIPT[..20], &format!("{} ", &SCRIPT[..20]), 1);
    assert_ne!(changed, page);
    let seen = browse(&changed, script, Clock::Virtual, Policy::Own);
    assert_eq!(seen, json!({"alarms": ["blocked script-src-elem"], "result": [true, 0]}));
}

#[test]
fn twenty_thousand_replies_are_quick() {
    let page = page_of(&rows(MANY));
    assert!(page.len() < BYTES, "{} bytes", page.len());
    let seen = browse(&page, include_str!("tests/speed.js"), Clock::Real, Policy::Own);
    assert_eq!(seen["alarms"], json!([]));
    let seen = &seen["result"];
    let of = |name: &str| seen[name].as_f64().unwrap();
    assert_eq!(seen["cardsAtOpen"], 50);
    assert!(of("opened") < OPEN_MS, "first cards after {} ms", of("opened"));
    assert!(of("firstKey") < 2.0 * ACTION_MS, "the first key, before anything is folded: {seen}");
    // The best of three: a neighbour on the machine is no fault of the page.
    let actions = seen["actions"].as_array().unwrap();
    assert!(actions.len() > 30);
    let slow: Vec<_> =
        actions.iter().filter(|action| action[1].as_f64().unwrap() >= ACTION_MS).collect();
    assert!(slow.is_empty(), "over {ACTION_MS} ms: {slow:?}");
    eprintln!("{seen}");
}
