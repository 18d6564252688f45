//! The hub's protocol: what a revision holds, what a file is, and its bytes.
//!
//! `GET /api/models/REPO/revision/REV` lists a revision, `HEAD` and `GET /REPO/resolve/COMMIT/FILE`
//! describe a file and send it, mostly by a redirect to another server.

use std::{io::Read, net::IpAddr, thread, time::Duration};

use serde::Deserialize;
use ureq::{
    Agent, Body,
    http::{HeaderMap, HeaderValue, Method, Response, Uri, header},
};

use super::{
    name::{Name, is_commit, is_hex, is_inside},
    settings::Settings,
};
use crate::error::{Error, Result};

/// Tries without any success in between.
pub(super) const TRIES: u32 = 4;
/// Before the second try; doubles with each further one.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// That a server can ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Without a byte from the server.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(60);
const MOST_REDIRECTS: usize = 8;
/// Bytes of a listing at most.
const LONGEST_LISTING: u64 = 100 << 20;
/// Characters of the hub's own message that an error shows.
const EXCERPT: usize = 200;

/// A revision's files.
#[derive(Debug)]
pub(super) struct Listing {
    pub commit: String,
    /// Paths in the repository.
    pub files: Vec<String>,
    /// What the hub has read in the GGUF files, if there are some.
    pub gguf_architecture: Option<String>,
}

/// A file of a commit.
#[derive(Clone, Debug)]
pub(super) struct Remote {
    pub name: String,
    /// The SHA-256 of its bytes or git's SHA-1, in hex: what its blob is called.
    pub etag: String,
    pub size: u64,
}

/// Why a request came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// The same would come of another try.
    Final(Error),
    /// Another try may help, after the wait that the server asks for.
    Passing { reason: String, wait: Duration },
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

impl Failure {
    pub fn passing(reason: impl ToString) -> Self {
        Self::Passing { reason: reason.to_string(), wait: Duration::ZERO }
    }

    /// For whoever does not try again.
    pub fn into_error(self) -> Error {
        match self {
            Self::Final(error) => error,
            Self::Passing { reason, .. } => Error::new("the hub gives no answer, or breaks it off")
                .got(reason)
                .hint("try again; what has been fetched is kept, and HF_HUB_OFFLINE=1 uses that alone"),
        }
    }
}

type Outcome<T> = std::result::Result<T, Failure>;

/// Tries up to `tries` times, with waits that double.
pub(super) fn with_tries<T>(tries: u32, mut attempt: impl FnMut() -> Outcome<T>) -> Outcome<T> {
    let mut tried = 1;
    loop {
        match attempt() {
            Err(Failure::Passing { wait, .. }) if tried < tries => pause(tried, wait),
            outcome => return outcome,
        }
        tried += 1;
    }
}

/// Waits before another try; `asked` by the server.
pub(super) fn pause(tried: u32, asked: Duration) {
    thread::sleep((FIRST_WAIT * 2u32.saturating_pow(tried.saturating_sub(1))).max(asked));
}

#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    authorization: Option<HeaderValue>,
}

impl Client {
    pub fn new(settings: &Settings) -> Result<Self> {
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            // Followed here, as the token must not go where a redirect leads.
            .max_redirects(0)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(SILENCE_TIMEOUT))
            .timeout_per_read(Some(SILENCE_TIMEOUT))
            .user_agent(concat!("inkling/", env!("CARGO_PKG_VERSION")));
        if is_local(&settings.endpoint) {
            config = config.proxy(None);
        }
        let authorization = settings.token.as_ref().map(|token| {
            let mut value = HeaderValue::from_str(&token.bearer())
                .map_err(|_| Error::new("the hub's token can't be sent"))?;
            value.set_sensitive(true);
            Ok::<_, Error>(value)
        });
        Ok(Self {
            agent: config.build().new_agent(),
            endpoint: settings.endpoint.clone(),
            authorization: authorization.transpose()?,
        })
    }

    /// What the name's revision holds.
    pub fn list(&self, name: &Name) -> Outcome<Listing> {
        let (endpoint, repository) = (&self.endpoint, &name.repository);
        let revision = name.escaped_revision();
        let url = format!("{endpoint}/api/models/{repository}/revision/{revision}");
        let mut response = self.send(&Method::GET, &url, 0)?;
        self.check_status(&response, name)?;
        let mut body = Vec::new();
        let mut reader = response.body_mut().as_reader().take(LONGEST_LISTING);
        reader.read_to_end(&mut body).map_err(Failure::passing)?;
        Ok(Listing::parse(&body).map_err(|error| error.at(url))?)
    }

    /// What a file is, without its bytes.
    pub fn describe(&self, name: &Name, commit: &str, file: &str) -> Outcome<Remote> {
        let url = self.url(name, commit, file);
        let response = self.send(&Method::HEAD, &url, 0)?;
        if !response.status().is_redirection() {
            self.check_status(&response, name)?;
        }
        Ok(Remote::read(response.headers(), file).map_err(|error| error.at(url))?)
    }

    /// A file's bytes from `from` on, or all of them where the server can't begin there.
    pub fn open(
        &self,
        name: &Name,
        commit: &str,
        file: &str,
        from: u64,
    ) -> Outcome<Response<Body>> {
        let response = self.send(&Method::GET, &self.url(name, commit, file), from)?;
        // The part that is here is the file's end, or not of this file: its check tells.
        if response.status() != 416 {
            self.check_status(&response, name)?;
        }
        Ok(response)
    }

    fn url(&self, name: &Name, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{commit}/{}", self.endpoint, name.repository, escaped(file))
    }

    /// Sends a request and follows redirects; a `HEAD` only within the hub, whose own answer tells
    /// of the file.
    fn send(&self, method: &Method, url: &str, from: u64) -> Outcome<Response<Body>> {
        let mut url = url.to_owned();
        for _ in 0..MOST_REDIRECTS {
            let own = origin(&url).is_some_and(|here| Some(here) == origin(&self.endpoint));
            let response = self.send_once(method, &url, from, own)?;
            let target = match response.headers().get(header::LOCATION) {
                Some(target) if response.status().is_redirection() => joined(&url, target)
                    .ok_or_else(|| Error::new("the hub redirects to no address").at(&url))?,
                _ => return Ok(response),
            };
            if *method == Method::HEAD && origin(&target) != origin(&url) {
                return Ok(response);
            }
            url = target;
        }
        Err(Error::new("the hub redirects in circles").at(url).into())
    }

    fn send_once(
        &self,
        method: &Method,
        url: &str,
        from: u64,
        own: bool,
    ) -> Outcome<Response<Body>> {
        let request =
            if *method == Method::HEAD { self.agent.head(url) } else { self.agent.get(url) };
        // Compressed, neither the length nor a range would be the file's.
        let mut request = request.header(header::ACCEPT_ENCODING, "identity");
        if let Some(authorization) = self.authorization.as_ref().filter(|_| own) {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        request.call().map_err(|error| Failure::passing(format!("{}: {error}", host_of(url))))
    }

    /// Whether the response is an answer, or why not.
    fn check_status(&self, response: &Response<Body>, name: &Name) -> Outcome<()> {
        let (status, headers) = (response.status().as_u16(), response.headers());
        if response.status().is_success() {
            return Ok(());
        }
        let got = match text(headers, "x-error-message") {
            Some(message) => {
                format!("{status}: {}", message.chars().take(EXCERPT).collect::<String>())
            }
            None => response.status().to_string(),
        };
        if matches!(status, 408 | 429 | 500..) {
            return Err(Failure::Passing { reason: got, wait: retry_after(headers) });
        }
        let page = format!("{}/{}", self.endpoint, name.repository);
        let error = match (status, text(headers, "x-error-code").unwrap_or_default()) {
            (404, "RevisionNotFound") => Error::new("no such revision of the repository"),
            (404, "EntryNotFound") => Error::new("no such file in the repository"),
            (404, _) => Error::new("no such repository on the hub")
                .hint("check its name (a path must exist, or begin with ./)"),
            (401 | 403, "GatedRepo") | (403, _) => {
                Error::new("the hub refuses this repository without its licence accepted")
                    .hint(format!("accept the licence at {page} and set HF_TOKEN"))
            }
            // The hub does not tell strangers which repositories there are.
            (401, _) if self.authorization.is_none() => Error::new(
                "no such repository on the hub, or one that is private or gated",
            )
            .hint(format!(
                "check its name; if it is there, accept the licence at {page} and set HF_TOKEN"
            )),
            (401, _) => Error::new("the hub does not accept the token, or has no such repository")
                .hint(format!("check the name, HF_TOKEN and the licence at {page}")),
            _ => Error::new("the hub refuses the request"),
        };
        Err(error.at(self.endpoint.clone()).got(got).into())
    }
}

impl Listing {
    fn parse(body: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Answer {
            sha: String,
            siblings: Vec<Sibling>,
            gguf: Option<Gguf>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        #[derive(Deserialize)]
        struct Gguf {
            architecture: Option<String>,
        }
        let answer: Answer = serde_json::from_slice(body)
            .map_err(|error| Error::new(format!("not a hub's list of files: {error}")))?;
        if !is_commit(&answer.sha) {
            return Err(Error::new("not a commit").expected("40 hex digits").got(answer.sha));
        }
        let files = answer.siblings.into_iter().map(|sibling| sibling.rfilename);
        Ok(Self {
            commit: answer.sha,
            files: files.filter(|file| is_inside(file)).collect(),
            gguf_architecture: answer.gguf.and_then(|gguf| gguf.architecture),
        })
    }
}

impl Remote {
    fn read(headers: &HeaderMap, file: &str) -> Result<Self> {
        let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"));
        let etag = etag.unwrap_or_default().trim_start_matches("W/").trim_matches('"');
        if !matches!(etag.len(), 40 | 64) || !is_hex(etag) {
            return Err(Error::new("the hub does not say which content the file has")
                .expected("a SHA-256, or git's SHA-1, as its etag")
                .got(if etag.is_empty() { "none" } else { etag }));
        }
        let size = text(headers, "x-linked-size").or_else(|| text(headers, "content-length"));
        let size = size.and_then(|size| size.parse().ok());
        let size = size.ok_or_else(|| Error::new("the hub does not say how long the file is"))?;
        Ok(Self { name: file.to_owned(), etag: etag.to_owned(), size })
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn retry_after(headers: &HeaderMap) -> Duration {
    let seconds = text(headers, "retry-after").and_then(|text| text.trim().parse().ok());
    Duration::from_secs(seconds.unwrap_or(0)).min(LONGEST_WAIT)
}

/// A path as it stands in an address.
fn escaped(file: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-~/".contains(&byte);
    let escape =
        |byte: u8| if plain(byte) { char::from(byte).into() } else { format!("%{byte:02X}") };
    file.bytes().map(escape).collect()
}

/// Scheme, host and port: who is told the token.
fn origin(url: &str) -> Option<(String, String, u16)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?.to_owned();
    let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
    Some((scheme, uri.host()?.to_lowercase(), port))
}

/// Where a redirect leads.
fn joined(url: &str, target: &HeaderValue) -> Option<String> {
    let target = target.to_str().ok()?;
    let (scheme, rest) = url.split_once("://")?;
    if target.starts_with("//") {
        return Some(format!("{scheme}:{target}"));
    }
    if target.starts_with('/') {
        return Some(format!("{scheme}://{}{target}", rest.split('/').next()?));
    }
    let absolute = target.starts_with("https://") || target.starts_with("http://");
    (absolute && origin(target).is_some()).then(|| target.to_owned())
}

fn host_of(url: &str) -> String {
    let uri = url.parse::<Uri>().ok();
    uri.and_then(|uri| Some(uri.authority()?.to_string())).unwrap_or_default()
}

/// Whether the address is this machine's, which no proxy reaches.
fn is_local(url: &str) -> bool {
    let host = origin(url).map_or_else(String::new, |(_, host, _)| host);
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_lead_to_whole_addresses() {
        let to = |target: &'static str| joined("http://a:1/b/c", &HeaderValue::from_static(target));
        assert_eq!(to("/x?y=1").as_deref(), Some("http://a:1/x?y=1"));
        assert_eq!(to("//b/x").as_deref(), Some("http://b/x"));
        assert_eq!(to("https://b/x").as_deref(), Some("https://b/x"));
        assert_eq!((to("x"), to("ftp://b/x"), to("")), (None, None, None));
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        assert_eq!(origin("https://A.b/c"), origin("https://a.b:443"));
        assert_ne!(origin("http://a:1"), origin("http://a:2"));
        assert_ne!(origin("http://a:443"), origin("https://a"));
        assert!(is_local("http://127.0.0.1:80/x") && is_local("http://[::1]:80"));
        assert!(!is_local("https://a.b") && !is_local(""));
    }

    #[test]
    fn listings_and_descriptions_are_checked() {
        let sha = "a".repeat(40);
        let list = |sha: &str, file: &str| {
            let body =
                format!(r#"{{"sha": "{sha}", "siblings": [{{"rfilename": "{file}"}}], "id": 1}}"#);
            Listing::parse(body.as_bytes())
        };
        assert_eq!(list(&sha, "a/b.gguf").unwrap().files, ["a/b.gguf"]);
        assert!(list(&sha, "../b.gguf").unwrap().files.is_empty());
        assert!(list("../x", "a").is_err() && Listing::parse(b"<html>").is_err());
        let remote = |etag: &str, size: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("etag", HeaderValue::from_str(etag).unwrap());
            headers.insert("content-length", HeaderValue::from_str(size).unwrap());
            Remote::read(&headers, "f")
        };
        assert_eq!(remote(&format!("W/\"{sha}\""), "3").unwrap().etag, sha);
        assert!(remote("\"../../x\"", "3").is_err() && remote(&sha, "-1").is_err());
        assert_eq!(escaped("a b/ü.gguf"), "a%20b/%C3%BC.gguf");
    }
}
