//! The headline's numbers, recomputed from the files of a real run by other code: what the report
//! says is what the trials say.

#[allow(dead_code, reason = "shared by several test binaries")]
mod common;

use std::{collections::HashMap, fs, path::Path, process::Command};

use serde_json::Value;

fn inkling(arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(env!("CARGO_BIN_EXE_inkling")).args(arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "inkling {arguments:?}: {}\n{stderr}", output.status);
    output.stdout
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn count(value: &Value) -> (u64, u64) {
    (value["k"].as_u64().unwrap(), value["n"].as_u64().unwrap())
}

#[test]
fn the_headline_is_what_the_trials_say() {
    let model = common::demo_model();
    let protocol = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/protocols/headline.toml");
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let dir = run.to_str().unwrap();
    inkling(&["run", protocol, "--model", model.to_str().unwrap(), "--out", dir]);
    inkling(&["grade", dir]);
    let report: Value = serde_json::from_slice(&inkling(&["report", dir, "--json"])).unwrap();
    let headline = &report["headline"];
    let trials = lines(&run.join("trials.jsonl"));
    let grades = lines(&run.join("grades.jsonl"));

    // (read as its own word, trials) of a condition.
    let read = |condition: &str| {
        let of = trials.iter().filter(|t| t["part"] == "readout" && t["condition"] == condition);
        let right = of.clone().filter(|t| t["read"]["word"] == t["concept"]);
        (right.count() as u64, of.count() as u64)
    };
    assert_eq!(count(&headline["read"]["all"]), read("concept"));
    assert_eq!(count(&headline["read"]["random"]), read("random"));
    assert_eq!(read("concept").1, 50);
    assert!(read("concept").0 >= 45, "the thought is readable: {:?}", read("concept"));
    // 50 draws at chance 1/50: more than 5 has a probability of 5e-4.
    assert!(read("random").0 <= 5, "random vectors must not read out: {:?}", read("random"));

    let verdicts: HashMap<&str, &Value> =
        grades.iter().map(|grade| (grade["trial"].as_str().unwrap(), grade)).collect();
    let said = |condition: &str, verdict: &dyn Fn(&Value) -> bool| {
        let of = trials.iter().filter(|t| t["part"] == "sampled" && t["condition"] == condition);
        let grades = of.map(|trial| verdicts[trial["id"].as_str().unwrap()]);
        (grades.clone().filter(|grade| verdict(grade)).count() as u64, grades.count() as u64)
    };
    let yes = |grade: &Value, name: &str| grade["verdicts"][name]["yes"].as_bool().unwrap();
    let replies = &headline["replies"];
    let contrast = &replies["contrast"];
    let claims = |grade: &Value| yes(grade, "claims");
    let identified = |grade: &Value| yes(grade, "coherent") && yes(grade, "claims_then_names");
    let mentions = |grade: &Value| yes(grade, "mentions");
    assert_eq!(count(&replies["mentions"]["count"]), said("concept", &mentions));
    assert_eq!(count(&contrast["hits"]["count"]), said("concept", &claims));
    assert_eq!(count(&contrast["random"]["count"]), said("random", &claims));
    assert_eq!(count(&contrast["clean"]["count"]), said("clean", &claims));
    assert_eq!(count(&contrast["identified"]["count"]), said("concept", &identified));
    assert_eq!(said("clean", &claims).1, 12, "one clean partner for each word and repeat");
    assert!(said("concept", &mentions).0 > said("random", &mentions).0, "the concept is written");

    let html = fs::read_to_string(run.join("report.html")).unwrap();
    assert!(html.contains("25 of 25") || html.contains("of 25"), "the held-out half is reported");
    for trial in trials.iter().filter(|trial| trial["part"] == "sampled") {
        let reply = &trial["reply"];
        let (ends, text) = (reply["ends"].as_array().unwrap(), reply["text"].as_str().unwrap());
        assert_eq!(ends.len(), reply["tokens"].as_array().unwrap().len(), "an end for every token");
        assert!(ends.windows(2).all(|pair| pair[0].as_u64() <= pair[1].as_u64()));
        assert_eq!(ends.last().unwrap().as_u64().unwrap() as usize, text.len());
        let is_clean = trial["condition"] == "clean";
        assert_eq!(trial["next"]["kl"].is_null(), is_clean);
        assert!(is_clean || trial["next"]["kl"].as_f64().unwrap() > 0.0);
        assert_eq!(trial["next"]["top"].as_array().unwrap().len(), 5);
    }
    for trial in trials.iter().filter(|trial| trial["condition"] != "clean") {
        let receipt = &trial["receipts"][0];
        assert_eq!(receipt["rows_touched"], receipt["rows_expected"]);
    }
}
