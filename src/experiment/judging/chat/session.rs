//! What the workers of one [`Endpoint::ask_all`] share: the budget, the rate, and the tries of a
//! question.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use super::{
    Answer, Endpoint, Failure, Question,
    wire::{Client, Outcome},
};
use crate::error::{Error, Result};

/// No wait between two tries is longer, whatever the endpoint asks for.
pub(super) const LONGEST_WAIT: Duration = Duration::from_secs(60);
const MINUTE: Duration = Duration::from_secs(60);

type Job = (usize, Question);
/// A worker's panic is carried to the caller, who would wait for the answer for ever.
type Done = (usize, thread::Result<Result<Answer>>);

pub(super) struct Session<'a> {
    endpoint: &'a Endpoint,
    client: Client<'a>,
    state: Mutex<State>,
    stopped: Condvar,
}

struct State {
    stopped: bool,
    requests: u64,
    retried: u64,
    /// When the rate allows the next request.
    next_slot: Instant,
}

/// Ends waits and requests in flight, however the caller's side ends.
pub(super) struct StopOnDrop<'a>(pub(super) &'a Session<'a>);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.state().stopped = true;
        self.0.stopped.notify_all();
        self.0.client.shut_down();
    }
}

impl<'a> Session<'a> {
    pub(super) fn open(endpoint: &'a Endpoint) -> Result<Self> {
        let state = State { stopped: false, requests: 0, retried: 0, next_slot: Instant::now() };
        let client = Client::new(endpoint)?;
        Ok(Self { endpoint, client, state: Mutex::new(state), stopped: Condvar::new() })
    }

    /// Requests sent, and those of them that were a second or later try.
    pub(super) fn requests(&self) -> (u64, u64) {
        let state = self.state();
        (state.requests, state.retried)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers questions until there are no more.
    pub(super) fn work(&self, inbox: &Mutex<mpsc::Receiver<Job>>, outbox: &mpsc::Sender<Done>) {
        loop {
            let job = inbox.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok((index, question)) = job else { return };
            let answer = catch_unwind(AssertUnwindSafe(|| self.ask(index, &question)));
            if outbox.send((index, answer)).is_err() {
                return;
            }
        }
    }

    /// Sends a question until it is answered or the tries are used up. An error ends all.
    fn ask(&self, index: usize, question: &Question) -> Result<Answer> {
        let body = self.client.body(question);
        if !self.take_request(false) {
            let max_requests = self.endpoint.max_requests.unwrap_or_default();
            return Ok(Err(Failure::Budget { max_requests }));
        }
        let (mut tries, mut wait) = (1, Duration::ZERO);
        loop {
            self.sleep_until(Instant::now() + wait)?;
            self.sleep_until(self.take_slot())?;
            let (reason, retry_after) = match self.client.send(&body)? {
                Outcome::Answer(text) => return Ok(Ok(text)),
                Outcome::Refused { status, body } => {
                    return Ok(Err(Failure::Refused { status, body }));
                }
                Outcome::Failed { reason, retry_after } => (reason, retry_after),
            };
            if tries > self.endpoint.retries {
                return Ok(Err(Failure::GaveUp { tries, reason }));
            }
            if !self.take_request(true) {
                let reason = format!("{reason} (the budget of requests allows no other try)");
                return Ok(Err(Failure::GaveUp { tries, reason }));
            }
            wait = back_off(self.endpoint.backoff, index, tries).max(retry_after);
            tries += 1;
        }
    }

    /// Takes one request from the budget; false when it is used up.
    fn take_request(&self, again: bool) -> bool {
        let mut state = self.state();
        let left = self.endpoint.max_requests.is_none_or(|most| state.requests < most);
        state.requests += u64::from(left);
        state.retried += u64::from(left && again);
        left
    }

    /// Takes the next moment at which the rate allows a request.
    fn take_slot(&self) -> Instant {
        let spacing = self.endpoint.per_minute.map_or(Duration::ZERO, |rate| MINUTE / rate);
        let mut state = self.state();
        let slot = state.next_slot.max(Instant::now());
        state.next_slot = slot + spacing;
        slot
    }

    /// When all is stopped an error, which nobody is left to read.
    fn sleep_until(&self, time: Instant) -> Result<()> {
        let left = time.saturating_duration_since(Instant::now());
        let (state, _) = self
            .stopped
            .wait_timeout_while(self.state(), left, |state| !state.stopped)
            .unwrap_or_else(PoisonError::into_inner);
        if state.stopped { Err(Error::new("stopped")) } else { Ok(()) }
    }
}

/// The wait after a failed try, from 0 to `base` · 2^(tries - 1) ("full jitter", so that questions
/// that failed together do not come back together).
pub(super) fn back_off(base: Duration, index: usize, tries: u32) -> Duration {
    let doubled = 1_u32.checked_shl(tries - 1).unwrap_or(u32::MAX);
    let mut hasher = DefaultHasher::new();
    (index, tries).hash(&mut hasher);
    let share = hasher.finish() as f64 / u64::MAX as f64;
    base.saturating_mul(doubled).min(LONGEST_WAIT).mul_f64(share)
}
