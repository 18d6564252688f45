//! The one error type: what went wrong, where, what was expected, what was got, and a hint.

use std::fmt;

/// What every fallible function of the crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// One clear message for a person. Build it with [`Error::new`] and the setters:
///
/// ```
/// # use inkling::error::Error;
/// let error = Error::new("layer out of range")
///     .at("requests.jsonl, line 3, inject[0].layer")
///     .expected("0..=29 (the model has 30 blocks)")
///     .got("42")
///     .hint("layers are counted from 0");
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, thiserror::Error)]
pub struct Error {
    what: String,
    place: Vec<String>,
    expected: Option<String>,
    got: Option<String>,
    hint: Option<String>,
}

impl Error {
    /// An error that says what went wrong.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), ..Self::default() }
    }

    /// Where it went wrong: a file, line, field or tensor. The outermost place is added last and
    /// printed first.
    #[must_use]
    pub fn at(mut self, place: impl Into<String>) -> Self {
        self.place.insert(0, place.into());
        self
    }

    /// What would have been right.
    #[must_use]
    pub fn expected(mut self, expected: impl fmt::Display) -> Self {
        self.expected = Some(expected.to_string());
        self
    }

    /// What was found instead.
    #[must_use]
    pub fn got(mut self, got: impl fmt::Display) -> Self {
        self.got = Some(got.to_string());
        self
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if !self.place.is_empty() {
            write!(f, "\n  where:    {}", self.place.join(": "))?;
        }
        let lines = [("expected:", &self.expected), ("got:", &self.got), ("hint:", &self.hint)];
        for (label, text) in lines {
            if let Some(text) = text {
                write!(f, "\n  {label:<9} {text}")?;
            }
        }
        Ok(())
    }
}

impl From<std::io::Error> for Error {
    /// `fs_err` names the path in the message.
    fn from(error: std::io::Error) -> Self {
        Self::new(error.to_string())
    }
}

/// Adds the place to an error on its way up.
pub trait Context<T> {
    /// See [`Error::at`].
    fn at(self, place: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn at(self, place: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| error.into().at(place()))
    }
}
