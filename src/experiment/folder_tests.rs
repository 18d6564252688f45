use super::*;
use crate::experiment::results::{Criterion, Verdict};

fn grade(trial: &str, judge: &str, yes: bool) -> Grade {
    let verdict = Verdict { yes, evidence: "because".into() };
    Grade {
        trial: trial.into(),
        judge: judge.into(),
        verdicts: [(Criterion::Claims, verdict)].into(),
        missing: BTreeMap::new(),
        mentioned: vec![],
    }
}

#[test]
fn one_writer_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let first = Folder::open(dir.path()).unwrap();
    let error = Folder::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("another process"), "{error}");
    assert!(error.contains(&std::process::id().to_string()), "{error}");
    drop(first);
    Folder::open(dir.path()).unwrap();
}

#[test]
fn folders_that_can_not_be_used_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = Folder::open(&file.join("run")).unwrap_err().to_string();
    assert!(error.contains("file"), "{error}");
    std::fs::write(dir.path().join(TRIALS), "").unwrap();
    let error = Folder::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("no manifest"), "{error}");
    let empty = tempfile::tempdir().unwrap();
    assert!(load(empty.path()).unwrap_err().to_string().contains("not a run folder"));
    std::fs::write(empty.path().join(MANIFEST), "{}").unwrap();
    assert!(load(empty.path()).unwrap_err().to_string().contains(MANIFEST));
}

#[test]
fn grades_are_appended_once_and_the_last_counts() {
    let dir = tempfile::tempdir().unwrap();
    let lines = || std::fs::read_to_string(dir.path().join(GRADES)).unwrap().lines().count();
    append_grades(dir.path(), &[grade("a", "rules-1", true), grade("b", "rules-1", true)]).unwrap();
    append_grades(dir.path(), &[grade("a", "rules-1", true), grade("b", "rules-1", true)]).unwrap();
    assert_eq!(lines(), 2);
    append_grades(dir.path(), &[grade("a", "rules-1", false), grade("a", "rules-2", true)])
        .unwrap();
    assert_eq!(lines(), 4);
    // A change of mind and back again: the last one counts.
    append_grades(dir.path(), &[grade("a", "rules-1", true)]).unwrap();
    assert_eq!(lines(), 5);
}

#[test]
fn differences_are_named_by_their_path() {
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let a = json(r#"{"parts": [{"doses": [1, 2]}], "seed": 1}"#);
    let path = |b: &str| difference(&a, &json(b), String::new());
    assert_eq!(path(r#"{"seed": 1, "parts": [{"doses": [1, 2]}]}"#), None);
    assert_eq!(path(r#"{"parts": [{"doses": [1, 3]}], "seed": 1}"#).unwrap(), "parts[0].doses[1]");
    assert_eq!(path(r#"{"parts": [{"doses": [1]}], "seed": 1}"#).unwrap(), "parts[0].doses");
    assert_eq!(path(r#"{"parts": [{"doses": [1, 2]}], "seed": 2}"#).unwrap(), "seed");
    assert_eq!(path(r#"{"parts": [{"doses": [1, 2]}]}"#).unwrap(), "seed");
}
