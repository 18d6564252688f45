//! One HTTP request and what its response means.

use std::{io::Read, net::IpAddr, time::Duration};

use serde_json::{Value, json};
use ureq::{
    Agent,
    http::{HeaderMap, HeaderValue, Uri, header},
};

use super::{Endpoint, Key, Question, session::LONGEST_WAIT};
use crate::error::{Error, Result};

/// Bytes of a response at most.
const LONGEST_BODY: usize = 1 << 20;
/// Characters of a response that an error shows.
const EXCERPT: usize = 200;
/// A shorter key ("none") may stand in an answer by chance, so only longer ones are hidden there.
const SECRET: usize = 16;

/// What came of one request.
#[derive(Debug)]
pub(super) enum Outcome {
    Answer(String),
    /// The same again would be the outcome of another try.
    Refused {
        status: u16,
        body: String,
    },
    /// Another try may help, after the wait that the endpoint asks for.
    Failed {
        reason: String,
        retry_after: Duration,
    },
}

pub(super) struct Client<'a> {
    endpoint: &'a Endpoint,
    url: String,
    authorization: Option<HeaderValue>,
    agent: Agent,
}

impl<'a> Client<'a> {
    pub(super) fn new(endpoint: &'a Endpoint) -> Result<Self> {
        let bearer = |Key(key): &Key| -> Result<HeaderValue> {
            let mut value = HeaderValue::from_str(&format!("Bearer {key}"))
                .map_err(|_| Error::new("the API key can't be sent"))?;
            value.set_sensitive(true);
            Ok(value)
        };
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            // A redirect would take the question to a place that nobody named.
            .max_redirects(0)
            .timeout_global(Some(endpoint.timeout))
            .max_idle_connections(endpoint.concurrency)
            .max_idle_connections_per_host(endpoint.concurrency)
            .user_agent(concat!("inkling/", env!("CARGO_PKG_VERSION")));
        if is_local(&endpoint.url) {
            config = config.proxy(None);
        }
        Ok(Self {
            endpoint,
            url: format!("{}/chat/completions", endpoint.url.trim_end_matches('/')),
            authorization: endpoint.key.as_ref().map(bearer).transpose()?,
            agent: config.build().new_agent(),
        })
    }

    /// Breaks off what is in flight and refuses what comes after.
    pub(super) fn shut_down(&self) {
        self.agent.clone().shutdown();
    }

    /// The request that asks a question.
    pub(super) fn body(&self, question: &Question) -> Vec<u8> {
        let system = question.system.iter().map(|text| json!({"role": "system", "content": text}));
        let user = json!({"role": "user", "content": question.user});
        let body = json!({
            "model": self.endpoint.model,
            "messages": system.chain([user]).collect::<Vec<Value>>(),
            "max_tokens": self.endpoint.max_tokens,
            "temperature": 0,
        });
        body.to_string().into_bytes()
    }

    /// Sends one request. An error when every other question would fare as this one.
    pub(super) fn send(&self, body: &[u8]) -> Result<Outcome> {
        let json = "application/json";
        let mut request = self.agent.post(&self.url).header(header::CONTENT_TYPE, json);
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        let mut response = match request.send(body) {
            Ok(response) => response,
            Err(error) => return Ok(self.failed(&self.cause(&error), Duration::ZERO)),
        };
        let (status, retry_after) = (response.status().as_u16(), retry_after(response.headers()));
        let mut body = Vec::new();
        // One byte more tells a longer body from one of just that length.
        let limit = LONGEST_BODY as u64 + 1;
        let end = response.body_mut().as_reader().take(limit).read_to_end(&mut body);
        let cut = end.err().map(|error| self.cause(&error.into()));
        if cut.is_some() && status >= 300 {
            // Half a key would not be recognised.
            body.clear();
        }
        let failed = |reason: &str| Ok(self.failed(reason, retry_after));
        match status {
            200..=299 => match (cut, self.answer(&body)) {
                (Some(cause), _) => failed(&format!("the response is cut short: {cause}")),
                (None, Err(reason)) => failed(&reason),
                (None, Ok(text)) => Ok(Outcome::Answer(text)),
            },
            408 | 409 | 425 | 429 | 500.. => failed(&format!("{status}: {}", self.show(&body))),
            300..=399 | 401..=404 => Err(self.refused_for_all(status, &body)),
            _ => Ok(Outcome::Refused { status, body: self.show(&body) }),
        }
    }

    /// The text of a complete response, or what is wrong with it.
    fn answer(&self, body: &[u8]) -> std::result::Result<String, String> {
        if body.len() > LONGEST_BODY {
            return Err("the response is longer than 1 MiB".to_owned());
        }
        let Ok(json) = serde_json::from_slice::<Value>(body) else {
            return Err(format!("the response is not JSON: {}", self.show(body)));
        };
        let choice = &json["choices"][0];
        match (choice["message"]["content"].as_str(), &self.endpoint.key) {
            (Some(text), Some(key)) if key.0.len() >= SECRET => Ok(key.hide_in(text)),
            (Some(text), _) => Ok(text.to_owned()),
            (None, _) => Err(format!(
                "no text in choices[0].message.content (finish_reason {}): {}",
                choice["finish_reason"],
                self.show(body)
            )),
        }
    }

    fn failed(&self, reason: &str, retry_after: Duration) -> Outcome {
        Outcome::Failed { reason: self.excerpt(reason), retry_after }
    }

    fn cause(&self, error: &ureq::Error) -> String {
        match error {
            ureq::Error::Timeout(_) => format!("not done within {:?}", self.endpoint.timeout),
            error => error.to_string(),
        }
    }

    fn refused_for_all(&self, status: u16, body: &[u8]) -> Error {
        let hint = match (status, &self.endpoint.key) {
            (401, None) => "the endpoint wants an API key",
            (401, Some(_)) => "check the API key",
            (402, _) => "check the account's credit",
            (403, _) => "check what the API key and its account may use",
            (404, _) => "check the URL (usually up to and including /v1) and the model's name",
            _ => "redirects are not followed: give the URL that they lead to",
        };
        Error::new("the endpoint refuses every question")
            .at(self.excerpt(&self.url))
            .got(format!("{status}: {}", self.show(body)))
            .hint(hint)
    }

    /// The start of a body. JSON is written anew, which undoes escapes that could hide the key.
    fn show(&self, body: &[u8]) -> String {
        match serde_json::from_slice::<Value>(body) {
            _ if body.is_empty() => "(no text)".to_owned(),
            Ok(json) => self.excerpt(&json.to_string()),
            Err(_) => self.excerpt(&String::from_utf8_lossy(body)),
        }
    }

    /// One line of at most [`EXCERPT`] characters without the key. Cutting comes last, as half a
    /// key would not be recognised.
    fn excerpt(&self, raw: &str) -> String {
        let mut text = String::with_capacity(raw.len());
        for c in raw.chars().filter(|c| !c.is_control()) {
            if c == '/' {
                // `\/` is a slash in JSON, in JSON inside of JSON `\\/`.
                text.truncate(text.trim_end_matches('\\').len());
            }
            text.push(c);
        }
        if let Some(key) = &self.endpoint.key {
            text = key.hide_in(&text);
        }
        match text.char_indices().nth(EXCERPT) {
            None => text,
            Some((end, _)) => format!("{}…", &text[..end]),
        }
    }
}

/// The wait that a response asks for, in seconds; dates are not read.
pub(super) fn retry_after(headers: &HeaderMap) -> Duration {
    let seconds = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let seconds = seconds.and_then(|text| text.trim().parse::<f64>().ok()).unwrap_or(0.0);
    Duration::from_secs_f64(seconds.max(0.0).min(LONGEST_WAIT.as_secs_f64()))
}

pub(super) fn is_http(url: &str) -> bool {
    let scheme = url.starts_with("http://") || url.starts_with("https://");
    scheme && host(url).is_some_and(|host| !host.is_empty())
}

/// Whether the URL's host is this machine, which no proxy reaches.
fn is_local(url: &str) -> bool {
    let host = host(url).unwrap_or_default();
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

fn host(url: &str) -> Option<String> {
    Some(url.parse::<Uri>().ok()?.host()?.to_owned())
}
