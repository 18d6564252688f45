//! Models of the hub, against a server that plays one: what is fetched, in which order, from where
//! on, and what is said when it can't be.

mod server;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use inkling::{
    hub::{Hub, Name, Settings, Watch},
    model::Model,
};
use serde_json::Value;
use server::{COMMIT, Reply, Seen, Server, etag};
use tempfile::TempDir;

const WEIGHTS: &str = "model.safetensors";
type Files = BTreeMap<String, Vec<u8>>;

/// The files of a tiny model, and some that nobody needs.
fn repository(name: &str) -> Files {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let mut files = Files::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap();
        if file == "config.json" || file.starts_with("model") {
            files.insert(file.to_owned(), fs::read(&path).unwrap());
        }
    }
    for other in ["README.md", "pytorch_model.bin", "consolidated.safetensors", "original/x.pth"] {
        files.insert(other.to_owned(), b"nobody asks for it".to_vec());
    }
    files
}

fn ggufs(names: &[&str]) -> Files {
    names.iter().map(|name| ((*name).to_owned(), format!("GGUF of {name}").into_bytes())).collect()
}

fn serve(_: &Seen) -> Reply {
    Reply::Serve
}

/// A user's machine: a cache and the program.
struct Machine(TempDir);

impl Machine {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn command(&self, server: &Server, model: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_inkling"));
        for name in ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_HUB_OFFLINE"] {
            command.env_remove(name);
        }
        command.args(["doctor", "--json", "--model", model]).current_dir(self.0.path());
        command.env("HF_ENDPOINT", server.url()).env("HF_HOME", self.0.path().join("hf"));
        command.env("XDG_CACHE_HOME", self.0.path()).stdin(Stdio::null());
        command
    }

    /// The model opens under this name; what was told on the way.
    #[track_caller]
    fn opens(&self, server: &Server, model: &str, name: &str) -> String {
        opened(&self.command(server, model).output().unwrap(), name)
    }

    /// The program refuses with all of `want` in its message.
    #[track_caller]
    fn refuses(&self, server: &Server, model: &str, want: &[&str]) {
        refused(&self.command(server, model).output().unwrap(), want);
    }

    fn folder(&self) -> PathBuf {
        self.0.path().join("hf/hub/models--org--tiny")
    }

    fn blob(&self, files: &Files, file: &str) -> PathBuf {
        let etag = etag(file, &files[file]);
        self.folder().join("blobs").join(etag)
    }

    fn incomplete(&self, files: &Files, file: &str) -> PathBuf {
        let mut path = self.blob(files, file).into_os_string();
        path.push(".incomplete");
        path.into()
    }

    /// With the library.
    fn fetch(&self, server: &Server, model: &str) -> inkling::error::Result<PathBuf> {
        let settings = Settings {
            endpoint: server.url(),
            cache: self.0.path().join("hf/hub"),
            token: None,
            offline: false,
        };
        Hub::new(settings)?.fetch(&Name::parse(model).unwrap()?, &mut Silent)
    }
}

struct Silent;

impl Watch for Silent {
    fn note(&mut self, _: &str) {}
    fn weights(&mut self, _: usize, _: u64) {}
    fn bytes(&mut self, _: &str, _: u64, _: u64) {}
    fn checked(&mut self, _: &str, _: u64, _: u64) {}
}

#[track_caller]
fn opened(output: &Output, name: &str) -> String {
    let error = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(0), "{error}");
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(findings["model"]["name"], name);
    error
}

#[track_caller]
fn refused(output: &Output, want: &[&str]) {
    let error = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(output.stdout.is_empty() && !error.contains("panicked"), "{error}");
    assert_eq!(error.matches("error:").count(), 1, "{error}");
    for want in want {
        assert!(error.contains(want), "{want:?} not in {error}");
    }
}

#[test]
fn the_first_time_fetches_and_the_second_only_asks_for_the_revision() {
    let (files, machine) = (repository("plain"), Machine::new());
    let server = Server::start(files.clone(), serve);
    let told = machine.opens(&server, "org/tiny", "org/tiny@01234567");
    assert_eq!(told.matches("fetching").count(), 3, "{told}");
    assert!(told.contains("fetching org/tiny: 308.2 kB of weights in one file"), "{told}");
    assert!(told.contains("fetching model.safetensors (308.2 kB)"), "{told}");
    let asked: Vec<String> =
        server.seen().iter().map(|seen| format!("{} {}", seen.method, seen.path)).collect();
    let file = |method: &str, file: &str| format!("{method} /org/tiny/resolve/{COMMIT}/{file}");
    let revision = "GET /api/models/org/tiny/revision/main".to_owned();
    let want = [
        revision,
        file("HEAD", "config.json"),
        file("GET", "config.json"),
        file("HEAD", WEIGHTS),
        file("GET", WEIGHTS),
    ];
    assert_eq!(asked, want);

    let folder = machine.folder();
    assert_eq!(fs::read_to_string(folder.join("refs/main")).unwrap(), COMMIT);
    let snapshot = folder.join("snapshots").join(COMMIT);
    for file in ["config.json", WEIGHTS] {
        assert_eq!(fs::read(snapshot.join(file)).unwrap(), files[file]);
        assert_eq!(fs::read(machine.blob(&files, file)).unwrap(), files[file]);
    }
    #[cfg(unix)]
    assert!(fs::read_link(snapshot.join(WEIGHTS)).unwrap().starts_with("../../blobs"));
    assert_eq!(fs::read_dir(&snapshot).unwrap().count(), 2, "leftovers");
    assert_eq!(fs::read_dir(folder.join("blobs")).unwrap().count(), 2, "leftovers");
    assert_eq!(Model::open(&snapshot).unwrap().commit.as_deref(), Some(COMMIT));

    assert_eq!(machine.opens(&server, "org/tiny", "org/tiny@01234567"), "");
    assert_eq!(server.seen().len(), want.len() + 1);
    let mut offline = machine.command(&server, "org/tiny");
    opened(&offline.env("HF_HUB_OFFLINE", "1").output().unwrap(), "org/tiny@01234567");
    assert_eq!(server.seen().len(), want.len() + 1, "a request while offline");
}

#[test]
fn offline_says_what_the_cache_lacks() {
    let (files, machine) = (repository("sharded"), Machine::new());
    let server = Server::start(files.clone(), serve);
    let offline = |want: &[&str]| {
        let mut command = machine.command(&server, "org/tiny");
        refused(&command.env("HF_HUB_OFFLINE", "1").output().unwrap(), want);
    };
    offline(&["HF_HUB_OFFLINE", "org/tiny", "main"]);
    assert!(server.seen().is_empty() && !machine.folder().exists());
    machine.fetch(&server, "org/tiny").unwrap();
    let shard = "model-00002-of-00002.safetensors";
    fs::remove_file(machine.blob(&files, shard)).unwrap();
    offline(&["HF_HUB_OFFLINE", shard]);
}

#[test]
fn revisions_are_pinned() {
    let machine = Machine::new();
    let server = Server::start(repository("plain"), serve);
    machine.opens(&server, "org/tiny@refs/pr/1", "org/tiny@01234567");
    assert!(server.seen()[0].path.ends_with("/revision/refs%2Fpr%2F1"));
    let refs = machine.folder().join("refs");
    assert_eq!(fs::read_to_string(refs.join("refs/pr/1")).unwrap(), COMMIT);
    machine.opens(&server, &format!("org/tiny@{COMMIT}"), "org/tiny@01234567");
    assert_eq!(fs::read_dir(refs).unwrap().count(), 1, "a commit needs no reference");
    assert_eq!(server.gets(WEIGHTS).len(), 1);
}

#[test]
fn a_path_that_exists_is_no_name() {
    let machine = Machine::new();
    let server = Server::start(repository("plain"), serve);
    let path = machine.0.path().join("org/tiny");
    fs::create_dir_all(&path).unwrap();
    for file in ["config.json", WEIGHTS] {
        fs::write(path.join(file), &repository("plain")[file]).unwrap();
    }
    machine.opens(&server, "org/tiny", "tiny");
    machine.refuses(&server, "./org/none", &["./org/none"]);
    machine.refuses(&server, "org/none.gguf", &["org/none.gguf"]);
    assert!(server.seen().is_empty());
}

#[test]
fn what_breaks_off_goes_on_where_it_ended() {
    let files = repository("plain");
    let size = files[WEIGHTS].len();
    let once = |seen: &Seen| match seen.gets(WEIGHTS) && seen.before == 0 {
        true => Reply::Drop(100_000),
        false => Reply::Serve,
    };
    let always = |seen: &Seen| match seen.gets(WEIGHTS) {
        true => Reply::Drop(100_000),
        false => Reply::Serve,
    };
    let check = |server: &Server, want: &[Option<usize>]| {
        let machine = Machine::new();
        let path = machine.fetch(server, "org/tiny").unwrap();
        assert_eq!(fs::read(path.join(WEIGHTS)).unwrap(), files[WEIGHTS]);
        let from: Vec<_> = server.gets(WEIGHTS).iter().map(Seen::from).collect();
        assert_eq!(from, want);
    };
    check(&Server::start(files.clone(), once), &[None, Some(100_000)]);
    let all = [None, Some(100_000), Some(200_000), Some(300_000)];
    assert!(size > 300_000 && size < 400_000);
    check(&Server::start(files.clone(), always), &all);
}

#[test]
fn an_interrupted_program_goes_on_where_it_ended() {
    let (files, machine) = (repository("plain"), Machine::new());
    let stall = |seen: &Seen| match seen.gets(WEIGHTS) && seen.before == 0 {
        true => Reply::Stall(100_000),
        false => Reply::Serve,
    };
    let server = Server::start(files.clone(), stall);
    let mut command = machine.command(&server, "org/tiny");
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let incomplete = machine.incomplete(&files, WEIGHTS);
    let begun = Instant::now();
    while fs::metadata(&incomplete).map_or(0, |file| file.len()) < 100_000 {
        assert!(begun.elapsed() < Duration::from_secs(30), "nothing comes");
        thread::sleep(Duration::from_millis(10));
    }
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    assert!(!child.wait().unwrap().success());
    assert_eq!(fs::metadata(&incomplete).unwrap().len(), 100_000);
    machine.opens(&server, "org/tiny", "org/tiny@01234567");
    assert_eq!(server.gets(WEIGHTS).last().unwrap().from(), Some(100_000));
    assert!(!incomplete.exists());
}

#[test]
fn partial_files_that_do_not_fit_are_fetched_anew() {
    let files = repository("plain");
    let whole = |seen: &Seen| if seen.gets(WEIGHTS) { Reply::Whole } else { Reply::Serve };
    let kept = |bytes: &[u8], server: &Server| {
        let machine = Machine::new();
        let path = machine.incomplete(&files, WEIGHTS);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
        machine.opens(server, "org/tiny", "org/tiny@01234567");
        assert_eq!(fs::read(machine.blob(&files, WEIGHTS)).unwrap(), files[WEIGHTS]);
    };
    kept(&files[WEIGHTS][..1000], &Server::start(files.clone(), whole));
    kept(&vec![0; files[WEIGHTS].len() + 1], &Server::start(files.clone(), serve));
    let server = Server::start(files.clone(), serve);
    kept(&files[WEIGHTS], &server);
    assert!(server.gets(WEIGHTS).is_empty(), "all of it was here");
}

#[test]
fn wrong_content_is_removed() {
    for (file, sum) in [(WEIGHTS, "SHA-256"), ("config.json", "git SHA-1")] {
        let (files, machine) = (repository("plain"), Machine::new());
        let corrupt = move |seen: &Seen| match seen.gets(file) && seen.before == 0 {
            true => Reply::Corrupt,
            false => Reply::Serve,
        };
        let server = Server::start(files.clone(), corrupt);
        machine.refuses(&server, "org/tiny", &["org/tiny", file, sum, "removed"]);
        assert!(!machine.incomplete(&files, file).exists() && !machine.blob(&files, file).exists());
        assert!(!machine.folder().join("refs/main").exists());
        machine.opens(&server, "org/tiny", "org/tiny@01234567");
    }
}

#[test]
fn refusals_say_what_to_do() {
    let refuses = |status, headers, want: &[&str]| {
        let machine = Machine::new();
        let server = Server::start(Files::new(), move |_| Reply::Status(status, headers));
        machine.refuses(&server, "org/tiny", want);
        assert_eq!(server.seen().len(), 1, "asked again");
    };
    refuses(404, "X-Error-Code: RepoNotFound", &["no such repository", "org/tiny", "404"]);
    refuses(404, "X-Error-Code: RevisionNotFound", &["no such revision"]);
    refuses(401, "X-Error-Message: Invalid username", &["Invalid username", "HF_TOKEN"]);
    refuses(403, "X-Error-Code: GatedRepo", &["licence", "HF_TOKEN", "/org/tiny"]);
    refuses(400, "", &["refuses", "400"]);

    // A gated repository is listed for everybody.
    let gated = |seen: &Seen| match seen.path.starts_with("/api") {
        true => Reply::Serve,
        false => Reply::Status(401, "X-Error-Code: GatedRepo"),
    };
    let server = Server::start(repository("plain"), gated);
    Machine::new().refuses(&server, "org/tiny", &["config.json", "licence", "HF_TOKEN"]);
    Machine::new().refuses(&server, "org/tiny@", &["ORG/NAME@REVISION"]);
}

#[test]
fn busy_servers_are_asked_again() {
    let machine = Machine::new();
    let busy = |seen: &Seen| match seen.before {
        0 => Reply::Status(500, ""),
        1 if seen.gets(WEIGHTS) => Reply::Status(429, "Retry-After: 1"),
        _ => Reply::Serve,
    };
    let server = Server::start(repository("plain"), busy);
    machine.opens(&server, "org/tiny", "org/tiny@01234567");

    let server = Server::start(Files::new(), |_| Reply::Status(503, ""));
    Machine::new().refuses(&server, "org/tiny", &["no answer", "503", "org/tiny"]);
    assert_eq!(server.seen().len(), 4);
}

#[test]
fn without_a_network_the_cache_answers() {
    let machine = Machine::new();
    let server = Server::start(repository("plain"), serve);
    machine.fetch(&server, "org/tiny").unwrap();
    // Nobody listens on port 1.
    let away = |machine: &Machine| {
        let mut command = machine.command(&server, "org/tiny");
        command.env("HF_ENDPOINT", "http://127.0.0.1:1").output().unwrap()
    };
    let told = opened(&away(&machine), "org/tiny@01234567");
    assert!(told.contains("can't be reached") && told.contains("cache"), "{told}");
    refused(&away(&Machine::new()), &["no answer", "127.0.0.1:1", "HF_HUB_OFFLINE"]);
}

#[test]
fn the_token_is_for_the_hub_alone() {
    let (files, machine) = (repository("plain"), Machine::new());
    let other = Server::start(files.clone(), serve);
    let target = format!("{}/blobs/{COMMIT}/{WEIGHTS}", other.url());
    let redirect = move |seen: &Seen| match seen.path.ends_with(WEIGHTS) {
        true => Reply::Redirect(target.clone()),
        false => Reply::Serve,
    };
    let server = Server::start(files, redirect);
    let output = machine.command(&server, "org/tiny").env("HF_TOKEN", "hf_secret").output();
    opened(&output.unwrap(), "org/tiny@01234567");
    let token = |seen: &Seen| seen.headers.get("authorization").cloned();
    assert!(server.seen().iter().all(|seen| token(seen).as_deref() == Some("Bearer hf_secret")));
    assert_eq!(other.gets(WEIGHTS).len(), 1);
    assert!(other.seen().iter().all(|seen| seen.method == "GET" && token(seen).is_none()));
}

#[test]
fn the_token_may_stand_in_a_file() {
    let machine = Machine::new();
    let server = Server::start(repository("plain"), serve);
    fs::create_dir(machine.0.path().join("hf")).unwrap();
    fs::write(machine.0.path().join("hf/token"), "hf_filed\n").unwrap();
    machine.opens(&server, "org/tiny", "org/tiny@01234567");
    assert_eq!(server.seen()[0].headers["authorization"], "Bearer hf_filed");
    let mut command = machine.command(&server, "org/tiny");
    refused(&command.env("HF_TOKEN", "hf two").output().unwrap(), &["HF_TOKEN", "not shown"]);
}

#[test]
fn shards_are_fetched() {
    let (files, machine) = (repository("sharded"), Machine::new());
    let server = Server::start(files, serve);
    let told = machine.opens(&server, "org/tiny", "org/tiny@01234567");
    assert!(told.contains("666.4 kB of weights in 2 files"), "{told}");
    for other in ["pytorch_model.bin", "consolidated.safetensors", "README.md"] {
        assert!(server.seen().iter().all(|seen| !seen.path.ends_with(other)), "{other}");
    }
}

#[test]
fn models_that_cannot_be_run_cost_no_weights() {
    let mut files = repository("plain");
    let config = String::from_utf8(files["config.json"].clone()).unwrap();
    files.insert("config.json".into(), config.replace("\"llama\"", "\"mamba\"").into());
    let server = Server::start(files, serve);
    Machine::new().refuses(&server, "org/tiny", &["unsupported architecture", "mamba", "org/tiny"]);
    assert!(server.seen().iter().all(|seen| !seen.path.ends_with(WEIGHTS)));

    // The hub reads GGUF files itself.
    let listing = |_: &Seen| {
        let file = r#"{"rfilename": "x.gguf"}"#;
        let gguf = r#"{"architecture": "mamba", "total": 1}"#;
        Reply::Json(format!(r#"{{"sha": "{COMMIT}", "siblings": [{file}], "gguf": {gguf}}}"#))
    };
    let server = Server::start(Files::new(), listing);
    Machine::new().refuses(&server, "org/tiny", &["unsupported architecture", "mamba"]);
    assert_eq!(server.seen().len(), 1);
}

#[test]
fn answers_that_are_no_hubs_are_refused() {
    let refuses = |body: &'static str, want: &[&str]| {
        let server = Server::start(Files::new(), move |_| Reply::Json(body.to_owned()));
        Machine::new().refuses(&server, "org/tiny", want);
    };
    refuses("<html>", &["not a hub's list", "/api/models/org/tiny"]);
    refuses(r#"{"sha": "../..", "siblings": []}"#, &["not a commit", "../.."]);
    let circle = Server::start(Files::new(), |seen| Reply::Redirect(seen.path.clone()));
    Machine::new().refuses(&circle, "org/tiny", &["circles"]);
}

#[test]
fn one_gguf_file_of_several_is_named() {
    let machine = Machine::new();
    let files =
        ggufs(&["README.md", "a.gguf", "q8/b-00001-of-00002.gguf", "q8/b-00002-of-00002.gguf"]);
    let server = Server::start(files.clone(), serve);
    let want = ["several GGUF files", "a.gguf, q8/b-00001-of-00002.gguf", "org/tiny:a.gguf"];
    machine.refuses(&server, "org/tiny", &want);
    machine.refuses(&server, "org/tiny:c.gguf", &["no such file", "c.gguf", "a.gguf"]);
    assert!(server.gets("a.gguf").is_empty());
    let path = machine.fetch(&server, "org/tiny:a.gguf").unwrap();
    assert_eq!(fs::read(&path).unwrap(), files["a.gguf"]);
    let path = machine.fetch(&server, "org/tiny@v1:q8/b-00001-of-00002.gguf").unwrap();
    let second = path.with_file_name("b-00002-of-00002.gguf");
    assert_eq!(fs::read(second).unwrap(), files["q8/b-00002-of-00002.gguf"]);
    let alone = Server::start(ggufs(&["README.md", "x.gguf"]), serve);
    let path = Machine::new().fetch(&alone, "org/tiny").unwrap();
    assert!(path.ends_with(format!("snapshots/{COMMIT}/x.gguf")));
}

#[test]
fn two_processes_fetch_a_file_once() {
    let (files, machine) = (repository("plain"), Machine::new());
    let slow = |seen: &Seen| {
        if seen.gets(WEIGHTS) {
            thread::sleep(Duration::from_millis(500));
        }
        Reply::Serve
    };
    let server = Server::start(files, slow);
    let start = || {
        let mut command = machine.command(&server, "org/tiny");
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    for child in [start(), start()] {
        opened(&child.wait_with_output().unwrap(), "org/tiny@01234567");
    }
    assert_eq!(server.gets(WEIGHTS).len(), 1);
}
