//! A client of OpenAI-compatible chat endpoints that asks a judge model many short questions.
//!
//! Every question gets one answer or one [`Failure`]; what no further question could survive (a
//! refused key, a wrong URL) ends everything with one [`Error`]. Nothing is stored.

#[cfg(test)]
pub(super) mod fake;
mod session;
mod wire;

use std::{
    fmt,
    panic::resume_unwind,
    path::Path,
    sync::{Mutex, mpsc},
    thread,
    time::Duration,
};

use self::session::{Session, StopOnDrop};
use crate::error::{Error, Result};

/// Every question in flight has a thread.
const MOST_THREADS: usize = 256;

/// A chat endpoint, a model of it, and how it is asked. Sampling is greedy (temperature 0).
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The base URL, usually up to and including `/v1`; `/chat/completions` is added.
    pub url: String,
    /// The model's name at the endpoint.
    pub model: String,
    /// Sent as a bearer token.
    pub key: Option<Key>,
    /// Questions in flight at once.
    pub concurrency: usize,
    /// Requests a minute, evenly spaced; none: as fast as answers come.
    pub per_minute: Option<u32>,
    /// Further tries of a question after its first.
    pub retries: u32,
    /// For one try, from the connection to the last byte.
    pub timeout: Duration,
    /// Requests sent at most in one [`Endpoint::ask_all`], further tries included.
    pub max_requests: Option<u64>,
    /// Tokens of an answer at most; a longer answer is cut there and still an answer.
    pub max_tokens: u32,
    /// The longest wait before the second try; it doubles with each further one.
    backoff: Duration,
}

/// An API key. It is never printed and is hidden in what an endpoint sends back.
#[derive(Clone)]
pub struct Key(String);

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The system message.
    pub system: Option<String>,
    /// The user's message.
    pub user: String,
}

/// The text of an answer, or why there is none.
pub type Answer = std::result::Result<String, Failure>;

/// Why a question has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Timeouts, broken connections, busy or broken servers, malformed responses; asking again
    /// later may help.
    #[error("no answer after {tries} {}: {reason}", if *tries == 1 { "try" } else { "tries" })]
    GaveUp {
        /// Requests sent.
        tries: u32,
        /// What was wrong with the last.
        reason: String,
    },
    /// The endpoint does not answer this question (most of 4xx).
    #[error("the endpoint refused the question: {status}: {body}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The start of the response.
        body: String,
    },
    /// Not asked.
    #[error("not asked: the budget of {max_requests} requests is used up")]
    Budget {
        /// [`Endpoint::max_requests`].
        max_requests: u64,
    },
}

/// What was done; `asked` is `answered` and `failed` together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Questions handed to [`Endpoint::ask_all`].
    pub asked: u64,
    /// Questions with an answer.
    pub answered: u64,
    /// Questions without one, those not sent included.
    pub failed: u64,
    /// HTTP requests sent.
    pub requests: u64,
    /// Requests that were a second or later try.
    pub retried: u64,
}

impl Key {
    /// The key in an environment variable. Errors name the variable, never what it holds.
    pub fn from_env(name: &str) -> Result<Self> {
        let place = format!("environment variable {name}");
        match std::env::var_os(name) {
            None => Err(Error::new("there is no API key").at(place).hint("set the variable")),
            Some(text) => Self::new(&text.to_string_lossy(), place),
        }
    }

    /// The key that is the content of a file. Errors name the file, never what it holds.
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::new(&String::from_utf8_lossy(&fs_err::read(path)?), path.display().to_string())
    }

    fn new(text: &str, place: String) -> Result<Self> {
        let key = text.trim();
        // A header can hold no more, and JSON escapes the quotation mark and the backslash.
        let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'"' && byte != b'\\';
        if key.is_empty() || !key.bytes().all(plain) {
            return Err(Error::new("not an API key")
                .at(place)
                .expected("one word of ASCII letters, digits and signs")
                .hint("what was found is not shown, as it may be secret"));
        }
        Ok(Self(key.to_owned()))
    }

    fn hide_in(&self, text: &str) -> String {
        text.replace(&self.0, "[key]")
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Endpoint {
    /// An endpoint without a key or limits: 8 questions at once, 5 further tries, 60 s a try,
    /// answers of 256 tokens.
    pub fn new(url: impl Into<String>, model: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            model: model.into(),
            key: None,
            concurrency: 8,
            per_minute: None,
            retries: 5,
            timeout: Duration::from_secs(60),
            max_requests: None,
            max_tokens: 256,
            backoff: Duration::from_millis(500),
        }
    }

    /// With another first wait, so that tests are short.
    #[cfg(test)]
    #[must_use]
    pub fn with_backoff(self, backoff: Duration) -> Self {
        Self { backoff, ..self }
    }

    /// Checks the settings without sending anything.
    pub fn check(&self) -> Result<()> {
        let wrong = |field: &str, expected: &str, got: String| {
            Err(Error::new(format!("the chat endpoint's {field} is wrong"))
                .expected(expected)
                .got(got))
        };
        if self.url.contains(['@', '?', '#']) || !wire::is_http(&self.url) {
            return Err(Error::new("the chat endpoint's URL is wrong")
                .expected("http://HOST/v1 or https://HOST/v1, without user name, query or fragment")
                .hint("it is not shown, as it may hold a secret"));
        }
        if self.model.trim().is_empty() {
            return wrong("model", "a name that the endpoint knows", "an empty one".into());
        }
        if !(1..=MOST_THREADS).contains(&self.concurrency) {
            let expected = format!("1 to {MOST_THREADS}");
            return wrong("concurrency", &expected, self.concurrency.to_string());
        }
        if self.per_minute == Some(0) || self.max_tokens == 0 || self.timeout.is_zero() {
            let expected = "at least one request a minute, one token and some time";
            return wrong("rate or limit", expected, "0".into());
        }
        Ok(())
    }

    /// Asks all questions, pulled in order and no earlier than they can be asked, and hands out
    /// each one's index and answer on the caller's thread as they come. An error of `done`, or a
    /// response that rules out every answer, breaks off what is in flight and is returned.
    pub fn ask_all(
        &self,
        questions: &mut dyn Iterator<Item = Question>,
        done: &mut dyn FnMut(usize, Answer) -> Result<()>,
    ) -> Result<Tally> {
        self.check()?;
        let session = Session::open(self)?;
        let (jobs, inbox) = mpsc::channel();
        let inbox = Mutex::new(inbox);
        let (outbox, answers) = mpsc::channel();
        let mut questions = questions.enumerate().fuse();
        let mut tally = Tally::default();
        thread::scope(|scope| -> Result<()> {
            // Dropped on every way out of this closure, so that the workers end.
            let jobs = jobs;
            let _stop = StopOnDrop(&session);
            for _ in 0..self.concurrency {
                let (session, inbox, outbox) = (&session, &inbox, outbox.clone());
                scope.spawn(move || session.work(inbox, &outbox));
            }
            let mut in_flight = 0;
            loop {
                while in_flight < self.concurrency
                    && let Some(job) = questions.next()
                {
                    jobs.send(job).expect("the inbox outlives the workers");
                    in_flight += 1;
                }
                if in_flight == 0 {
                    return Ok(());
                }
                let (index, answer) = answers.recv().expect("the outbox outlives the workers");
                in_flight -= 1;
                let answer = answer.unwrap_or_else(|panic| resume_unwind(panic))?;
                tally.asked += 1;
                *(if answer.is_ok() { &mut tally.answered } else { &mut tally.failed }) += 1;
                done(index, answer)?;
            }
        })?;
        let (requests, retried) = session.requests();
        Ok(Tally { requests, retried, ..tally })
    }
}

#[cfg(test)]
#[path = "chat_tests.rs"]
mod tests;
