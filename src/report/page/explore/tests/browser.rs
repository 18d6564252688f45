//! Runs a page in a headless browser and reads what a test script found out.

use std::{
    env, fs,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::source_hash;

const PRELUDE: &str = include_str!("prelude.js");
/// The longest that a browser may take, its start included.
const LIMIT: Duration = Duration::from_secs(120);
/// One browser at a time: they measure times, and there are few cores.
static TURN: Mutex<()> = Mutex::new(());

/// Which clock the page sees.
#[derive(Clone, Copy, PartialEq)]
pub enum Clock {
    /// The real one; the document is read when it has loaded.
    Real,
    /// One that leaps over waits; the document is read after ten of its seconds.
    Virtual,
}

/// What the policy of the page's copy lets run beside the tests' scripts.
#[derive(Clone, Copy, PartialEq)]
pub enum Policy {
    /// What the page's own policy does.
    Own,
    /// Everything, as if a page had no policy.
    None,
}

/// What `script`, at the end of a copy of the page, gives to `finish`: `alarms` (errors, alerts and
/// violations of the policy, as texts) and `result`.
pub fn browse(page: &str, script: &str, clock: Clock, policy: Policy) -> Value {
    let turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let folder = Folder::new();
    let path = folder.0.join("page.html");
    fs::write(&path, with_script(page, script, policy)).expect("a temporary file");
    let document = dump(&folder, &path, clock);
    drop(turn);
    let result = document
        .split_once("<pre id=\"result\">")
        .and_then(|(_, rest)| rest.split_once("</pre>"))
        .unwrap_or_else(|| panic!("no result; the page ends in {}", end(&document)));
    serde_json::from_str(result.0).expect("the result is JSON")
}

fn with_script(page: &str, script: &str, policy: Policy) -> String {
    const SOURCES: &str = "script-src ";
    assert_eq!(page.matches(SOURCES).count(), 1, "the page's policy names its script");
    let page = match policy {
        Policy::Own => {
            let hashes = format!("{SOURCES}{} {} ", source_hash(PRELUDE), source_hash(script));
            page.replacen(SOURCES, &hashes, 1)
        }
        Policy::None => page.replacen("Content-Security-Policy", "none", 1),
    };
    let page = page.replacen("<head>", &format!("<head><script>{PRELUDE}</script>"), 1);
    let (page, rest) = page.rsplit_once("</body>").expect("a body");
    format!("{page}<script>{script}</script></body>{rest}")
}

/// The document as it stands in the end.
fn dump(folder: &Folder, page: &std::path::Path, clock: Clock) -> String {
    let browser = env::var("CHROMIUM").unwrap_or_else(|_| "chromium".into());
    let out = folder.0.join("out.html");
    let mut command = Command::new(&browser);
    command
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"])
        .arg(format!("--user-data-dir={}", folder.0.join("profile").display()))
        .args((clock == Clock::Virtual).then_some("--virtual-time-budget=10000"))
        .arg(format!("file://{}", page.display()))
        .stdin(Stdio::null())
        .stdout(fs::File::create(&out).expect("a temporary file"))
        .stderr(Stdio::null());
    let mut child = command.spawn().unwrap_or_else(|error| {
        panic!("{browser}: {error}; install chromium, or set CHROMIUM to a browser's path")
    });
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child") {
            break status;
        }
        if start.elapsed() > LIMIT {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{browser} took longer than {} s", LIMIT.as_secs());
        }
        thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{browser} ended with {status}");
    fs::read_to_string(out).expect("the document")
}

fn end(text: &str) -> String {
    let tail: Vec<_> = text.chars().rev().take(300).collect();
    tail.into_iter().rev().collect()
}

/// A temporary folder, gone when it is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("explore-{}-{next}", std::process::id()));
        fs::create_dir_all(&path).expect("a temporary folder");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
