//! Where the hub and its cache are: the environment variables that Hugging Face's own programs read.

use std::{
    env, fmt,
    path::{Path, PathBuf},
};

use fs_err as fs;

use crate::error::{Error, Result};

const ENDPOINT: &str = "https://huggingface.co";

/// How the hub is reached and where its files are kept.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its address, without a slash at its end.
    pub endpoint: String,
    /// The folder with one folder a repository.
    pub cache: PathBuf,
    /// Sent to the endpoint and to nobody else.
    pub token: Option<Token>,
    /// Nothing is sent; what is not in the cache is an error.
    pub offline: bool,
}

/// A token. It is never printed.
#[derive(Clone)]
pub struct Token(String);

impl Settings {
    /// Reads `HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HF_TOKEN`,
    /// `HF_TOKEN_PATH` and `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    ///
    /// One of them holds what can't be used.
    pub fn from_env() -> Result<Self> {
        let home = home()?;
        let endpoint = text("HF_ENDPOINT")?.unwrap_or_else(|| ENDPOINT.to_owned());
        Ok(Self {
            endpoint: checked_endpoint(&endpoint)?,
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            token: token(&home)?,
            offline: text("HF_HUB_OFFLINE")?.is_some_and(|value| is_yes(&value)),
        })
    }
}

impl Token {
    /// A token found at `place`, which errors name in place of what it holds.
    fn new(text: &str, place: &str) -> Result<Option<Self>> {
        let token = text.trim();
        if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Error::new("not a token of the hub")
                .at(place)
                .expected("one word of ASCII letters, digits and signs")
                .hint("what was found is not shown, as it may be secret"));
        }
        Ok((!token.is_empty()).then(|| Self(token.to_owned())))
    }

    /// For the header of a request.
    pub(super) fn bearer(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Where Hugging Face's programs keep what they have.
fn home() -> Result<PathBuf> {
    if let Some(home) = path("HF_HOME") {
        return Ok(home);
    }
    let cache = path("XDG_CACHE_HOME").or_else(|| Some(env::home_dir()?.join(".cache")));
    cache.map(|cache| cache.join("huggingface")).ok_or_else(|| {
        Error::new("no folder to keep models in").hint("set HF_HOME, or give a model's path")
    })
}

fn token(home: &Path) -> Result<Option<Token>> {
    if let Some(token) = text("HF_TOKEN")? {
        return Token::new(&token, "HF_TOKEN");
    }
    let file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
    if !file.is_file() {
        return Ok(None);
    }
    Token::new(&String::from_utf8_lossy(&fs::read(&file)?), &file.display().to_string())
}

fn path(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn text(name: &str) -> Result<Option<String>> {
    let Some(value) = env::var_os(name).filter(|value| !value.is_empty()) else { return Ok(None) };
    let text = value.into_string();
    text.map(Some).map_err(|_| Error::new("not a text").at(name).expected("UTF-8"))
}

fn is_yes(value: &str) -> bool {
    ["1", "on", "yes", "true"].iter().any(|yes| value.eq_ignore_ascii_case(yes))
}

fn checked_endpoint(endpoint: &str) -> Result<String> {
    let host = ["https://", "http://"].iter().find_map(|scheme| endpoint.strip_prefix(scheme));
    if host.is_none_or(|host| host.is_empty() || host.starts_with(['/', ':']))
        || endpoint.contains(['@', '?', '#', ' '])
    {
        return Err(Error::new("not the address of a hub")
            .at("HF_ENDPOINT")
            .expected("http://HOST or https://HOST, without user name, query or fragment"));
    }
    Ok(endpoint.trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_checked() {
        assert_eq!(checked_endpoint("https://a.b/").unwrap(), "https://a.b");
        assert_eq!(checked_endpoint("http://127.0.0.1:1/x").unwrap(), "http://127.0.0.1:1/x");
        for wrong in ["", "a.b", "ftp://a", "https://", "https:///x", "http://u:p@a", "http://a?b"]
        {
            assert!(checked_endpoint(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn tokens_are_words_and_stay_hidden() {
        let token = Token::new(" hf_secret\n", "HF_TOKEN").unwrap().unwrap();
        assert_eq!(
            (token.bearer().as_str(), format!("{token:?}").as_str()),
            ("Bearer hf_secret", "Token(..)")
        );
        assert!(Token::new(" \n", "HF_TOKEN").unwrap().is_none());
        let error = Token::new("two words", "HF_TOKEN").unwrap_err().to_string();
        assert!(
            error.contains("HF_TOKEN") && !error.contains("words of") && !error.contains("two"),
            "{error}"
        );
    }
}
