//! A chat server on 127.0.0.1 for tests.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use serde_json::{Value, json};

/// What the server does with a request.
pub enum Reply {
    /// Status, further header lines, body.
    Send(u16, &'static str, String),
    /// These bytes as they are; then the connection is closed.
    Break(Vec<u8>),
    /// Silence, until the client gives up, for 5 s at most.
    Silence,
}

/// A request as the server saw it.
#[derive(Clone)]
pub struct Seen {
    /// The request line.
    pub line: String,
    /// By lower-case names.
    pub headers: HashMap<String, String>,
    /// The JSON that was sent.
    pub body: Value,
    /// How often the question came before.
    pub before: u32,
}

impl Seen {
    /// The user's message.
    pub fn question(&self) -> &str {
        let messages = self.body["messages"].as_array().expect("messages");
        messages.last().and_then(|message| message["content"].as_str()).expect("a question")
    }
}

type Handler = dyn Fn(&Seen) -> Reply + Send + Sync;

/// A server on 127.0.0.1, up to its drop.
pub struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    down: Arc<AtomicBool>,
}

impl Server {
    /// Answers by `handler`, which several threads call.
    pub fn start(handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, down) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let (all, stop, handler) = (Arc::clone(&seen), Arc::clone(&down), Arc::new(handler));
        thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let (all, handler) = (Arc::clone(&all), Arc::clone(&handler));
                thread::spawn(move || serve(stream?, &all, &*handler));
            }
        });
        Self { address, seen, down }
    }

    /// The base URL, up to and including `/v1`.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.down.store(true, Ordering::SeqCst);
        // Wakes the listener.
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(stream: TcpStream, all: &Mutex<Vec<Seen>>, handler: &Handler) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.set_nodelay(true)?;
    let (mut reader, mut writer) = (BufReader::new(stream.try_clone()?), stream);
    while let Some(mut request) = receive(&mut reader)? {
        {
            let mut all = all.lock().unwrap();
            let same = |one: &&Seen| one.question() == request.question();
            request.before = all.iter().filter(same).count() as u32;
            all.push(request.clone());
        }
        match handler(&request) {
            Reply::Send(status, headers, body) => {
                writer.write_all(&http(status, headers, &body))?;
            }
            Reply::Break(bytes) => return writer.write_all(&bytes),
            Reply::Silence => return reader.read(&mut [0]).map(drop),
        }
    }
    Ok(())
}

fn receive(reader: &mut impl BufRead) -> std::io::Result<Option<Seen>> {
    let mut lines = Vec::new();
    while lines.last().is_none_or(|line: &String| !line.is_empty()) {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        lines.push(line.trim_end().to_owned());
    }
    let pairs = lines[1..].iter().filter_map(|line| line.split_once(": "));
    let headers: HashMap<String, String> =
        pairs.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
    let mut body = vec![0; headers["content-length"].parse().unwrap()];
    reader.read_exact(&mut body)?;
    let body = serde_json::from_slice(&body).unwrap();
    Ok(Some(Seen { line: lines.swap_remove(0), headers, body, before: 0 }))
}

/// A response's bytes; `headers` are whole lines.
pub fn http(status: u16, headers: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status} X\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len()).into()
}

/// The JSON of an answer.
pub fn chat(text: &str) -> String {
    json!({"choices": [{"message": {"role": "assistant", "content": text}}]}).to_string()
}

/// An answer.
pub fn say(text: &str) -> Reply {
    Reply::Send(200, "", chat(text))
}
