//! The corpus, its files cut and changed: the part of fuzzing that every test run repeats.

use std::path::{Path, PathBuf};

use fs_err as fs;

use super::{READERS, Reader, most_bytes};

/// Positions of a file at which it is cut, and those at which a byte is changed.
const PLACES: usize = 60;

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.is_file()).collect();
    files.sort();
    files
}

fn corpus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name)
}

/// Reads bytes and checks the memory that this takes; whether they are accepted.
fn read(reader: Reader, bytes: &[u8], place: impl Fn() -> String) -> bool {
    let mut accepted = false;
    let taken = allocation_counter::measure(|| accepted = reader(bytes).is_ok());
    let most = most_bytes(bytes.len());
    assert!(
        taken.bytes_max <= most,
        "{} bytes of memory, not {most}: {}",
        taken.bytes_max,
        place()
    );
    accepted
}

#[test]
fn seeds_are_accepted() {
    let mut refused = Vec::new();
    for (name, reader) in READERS {
        let seeds = files(&corpus(name));
        assert!(seeds.len() > 2, "{name}");
        for path in seeds {
            if let Err(error) = reader(&fs::read(&path).unwrap()) {
                refused.push(format!("{}: {error}", path.display()));
            }
        }
    }
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}

#[test]
fn hostile_files_do_no_harm() {
    for (name, reader) in READERS {
        for path in files(&corpus(name).join("hostile")) {
            read(reader, &fs::read(&path).unwrap(), || path.display().to_string());
        }
    }
}

#[test]
fn cut_and_changed_seeds_do_no_harm() {
    for (name, reader) in READERS {
        for path in files(&corpus(name)) {
            let bytes = fs::read(&path).unwrap();
            for at in (0..bytes.len()).step_by(bytes.len().div_ceil(PLACES)) {
                let place = || format!("{} at {at}", path.display());
                read(reader, &bytes[..at], place);
                for change in [1, 0x80, 0xff, bytes[at]] {
                    let mut changed = bytes.clone();
                    changed[at] ^= change;
                    read(reader, &changed, place);
                }
            }
        }
    }
}
