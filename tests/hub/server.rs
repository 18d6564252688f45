//! A hub on 127.0.0.1 with one repository, that can be told to misbehave.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use inkling::files::hex;
use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// Of the repository's only revision, whatever it is called.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does with a request.
pub enum Reply {
    /// What a hub does.
    Serve,
    /// A status, and further header lines.
    Status(u16, &'static str),
    /// The connection is closed after so many bytes of the body.
    Drop(usize),
    /// Nothing more comes after so many bytes of the body.
    Stall(usize),
    /// All of the file, with its first byte wrong.
    Corrupt,
    /// All of the file, whatever range is asked for.
    Whole,
    /// This text.
    Json(String),
    /// To this address.
    Redirect(String),
}

/// A request as the server saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub path: String,
    /// By lower-case names.
    pub headers: HashMap<String, String>,
    /// How often the same was asked before.
    pub before: usize,
}

impl Seen {
    /// Whether the bytes of this file are asked for.
    pub fn gets(&self, file: &str) -> bool {
        self.method == "GET" && self.path.ends_with(&format!("/{file}"))
    }

    /// The first byte asked for.
    pub fn from(&self) -> Option<usize> {
        let range = self.headers.get("range")?.strip_prefix("bytes=")?.strip_suffix('-')?;
        range.parse().ok()
    }
}

type Files = BTreeMap<String, Vec<u8>>;
type Handler = dyn Fn(&Seen) -> Reply + Send + Sync;

/// A server, up to its drop.
pub struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    down: Arc<AtomicBool>,
}

impl Server {
    /// A repository of these files; `handler`, which several threads call, may misbehave.
    pub fn start(files: Files, handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, down) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let (all, stop) = (Arc::clone(&seen), Arc::clone(&down));
        let (files, handler) = (Arc::new(files), Arc::new(handler));
        thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let (all, files, handler) =
                    (Arc::clone(&all), Arc::clone(&files), Arc::clone(&handler));
                thread::spawn(move || serve(&stream?, &all, &files, &*handler));
            }
        });
        Self { address, seen, down }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Those for the bytes of a file.
    pub fn gets(&self, file: &str) -> Vec<Seen> {
        self.seen().into_iter().filter(|seen| seen.gets(file)).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.down.store(true, Ordering::SeqCst);
        // Wakes the listener.
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(
    mut stream: &TcpStream,
    all: &Mutex<Vec<Seen>>,
    files: &Files,
    handler: &Handler,
) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    while let Some(mut request) = receive(&mut reader)? {
        {
            let mut all = all.lock().unwrap();
            let same = |one: &&Seen| one.method == request.method && one.path == request.path;
            request.before = all.iter().filter(same).count();
            all.push(request.clone());
        }
        let reply = handler(&request);
        let (head, body) = answer(&request, files, &reply);
        stream.write_all(head.as_bytes())?;
        if request.method == "HEAD" {
            continue;
        }
        match reply {
            Reply::Drop(n) => {
                stream.write_all(&body[..n.min(body.len())])?;
                return stream.shutdown(Shutdown::Both);
            }
            Reply::Stall(n) => {
                stream.write_all(&body[..n.min(body.len())])?;
                return reader.read(&mut [0]).map(drop);
            }
            _ => stream.write_all(&body)?,
        }
    }
    Ok(())
}

fn receive(reader: &mut impl BufRead) -> io::Result<Option<Seen>> {
    let mut lines = Vec::new();
    while lines.last().is_none_or(|line: &String| !line.is_empty()) {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        lines.push(line.trim_end().to_owned());
    }
    let pairs = lines[1..].iter().filter_map(|line| line.split_once(": "));
    let headers = pairs.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
    let mut words = lines[0].split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    Ok(Some(Seen { method, path, headers, before: 0 }))
}

/// A response's head and body.
fn answer(request: &Seen, files: &Files, reply: &Reply) -> (String, Vec<u8>) {
    let empty = |line: &str| (format!("HTTP/1.1 {line}\r\nContent-Length: 0\r\n\r\n"), Vec::new());
    if let Reply::Status(status, headers) = reply {
        return empty(format!("{status} X\r\n{headers}").trim_end());
    }
    let ok = |body: String| {
        (format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()), body.into_bytes())
    };
    if let Reply::Json(body) = reply {
        return ok(body.clone());
    }
    if request.path.starts_with("/api/models/") {
        if let Reply::Redirect(target) = reply {
            return empty(&format!("307 X\r\nLocation: {target}"));
        }
        let siblings: Vec<_> = files.keys().map(|file| json!({"rfilename": file})).collect();
        return ok(json!({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).to_string());
    }
    let file = request.path.split_once(&format!("/{COMMIT}/")).map(|(_, file)| file);
    let Some((file, bytes)) = file.and_then(|file| files.get_key_value(file)) else {
        return empty("404 X\r\nX-Error-Code: EntryNotFound");
    };
    let mut fields = format!("X-Repo-Commit: {COMMIT}\r\n");
    let etag = etag(file, bytes);
    if is_large(file) {
        let size = bytes.len();
        let _ = write!(fields, "X-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {size}\r\n");
    } else {
        let _ = write!(fields, "ETag: \"{etag}\"\r\n");
    }
    if let Reply::Redirect(target) = reply {
        return empty(&format!("302 X\r\n{fields}Location: {target}"));
    }
    let mut body = bytes.clone();
    let mut line = "200 OK".to_owned();
    if let (Some(from), false) = (request.from(), matches!(reply, Reply::Whole)) {
        if from >= bytes.len() {
            return empty("416 X");
        }
        body.drain(..from);
        let last = bytes.len() - 1;
        line = format!("206 X\r\nContent-Range: bytes {from}-{last}/{}", bytes.len());
    }
    if matches!(reply, Reply::Corrupt) {
        body[0] ^= 1;
    }
    (format!("HTTP/1.1 {line}\r\n{fields}Content-Length: {}\r\n\r\n", body.len()), body)
}

/// The hub's name of a file's content: its SHA-256, or git's SHA-1 of a small file.
pub fn etag(file: &str, bytes: &[u8]) -> String {
    if is_large(file) {
        return hex(&Sha256::digest(bytes));
    }
    hex(&Sha1::new_with_prefix(format!("blob {}\0", bytes.len())).chain_update(bytes).finalize())
}

fn is_large(file: &str) -> bool {
    let ending = Path::new(file).extension();
    ending.is_some_and(|ending| ending == "safetensors" || ending == "gguf")
}
