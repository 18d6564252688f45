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
fn half_lines_are_dropped_and_broken_ones_named() {
    let parse = |text: &str| {
        let mut lines = Vec::new();
        let keep = |line: u32| {
            lines.push(line);
            Ok(())
        };
        let length = for_each_line(&mut text.as_bytes(), keep)?;
        Ok::<_, Error>((lines, length))
    };
    assert_eq!(parse("").unwrap(), (vec![], 0));
    assert_eq!(parse("1\n2\n").unwrap(), (vec![1, 2], 4));
    assert_eq!(parse("1\n2").unwrap(), (vec![1], 2), "2 may be the start of 23");
    assert_eq!(parse("1").unwrap(), (vec![], 0));
    let error = parse("1\nx\n3\n").unwrap_err().to_string();
    assert!(error.contains("line 2"), "{error}");
}

#[test]
fn appending_goes_on_where_the_whole_lines_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lines.jsonl");
    std::fs::write(&path, "1\n2\n3").unwrap();
    let mut lines = Vec::new();
    let keep = |line: u32| {
        lines.push(line);
        Ok(())
    };
    let mut file = Lines::open(&path, keep).unwrap();
    assert_eq!(lines, [1, 2]);
    file.append(&44).unwrap();
    file.append(&5).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n2\n44\n5\n");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named() {
    let path = PathBuf::from("/dev/full");
    let file = fs::OpenOptions::new().append(true).open(&path).unwrap();
    let error = Lines { file, path, length: 0 }.append(&1).unwrap_err().to_string();
    assert!(error.contains("/dev/full") && error.contains("same command"), "{error}");
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
