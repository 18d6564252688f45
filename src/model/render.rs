//! A request's messages, text or token ids to its prompt.

use super::{
    Model,
    chat::Settings,
    date::Date,
    prompt::{PlacedTurn, Prompt},
    tokenizer::Tokenizer,
};
use crate::{
    error::{Error, Result},
    request::{Message, Request, Thinking},
};

impl Model {
    /// Renders a request's prompt: its messages with the chat template, its text with the
    /// tokenizer's own special tokens, or its token ids as they are.
    ///
    /// # Errors
    ///
    /// Not exactly one of the three; an option that does not belong to it; no tokenizer or
    /// template; the template refuses; a prompt that is empty, too long, or has unknown token ids.
    pub fn render(&self, request: &Request) -> Result<Prompt> {
        if request.messages.is_none() {
            refuse_chat_options(request)?;
        }
        if request.prefill.as_deref().is_some_and(|prefill| prefill.ends_with(' ')) {
            return Err(Error::new("a prefill must not end with a blank: it would split a token")
                .at("prefill")
                .hint("tokens start with their blank: leave it to the model"));
        }
        let prompt = match (&request.messages, &request.text, &request.tokens) {
            (Some(messages), None, None) => self.render_messages(messages, request)?,
            (None, Some(text), None) => {
                let text = format!("{text}{}", request.prefill.as_deref().unwrap_or_default());
                self.tokenise(text, true, Vec::new()).map_err(|error| error.at("text"))?
            }
            (None, None, Some(tokens)) => self.take_tokens(tokens, request)?,
            (messages, text, tokens) => {
                let given = [
                    ("messages", messages.is_some()),
                    ("text", text.is_some()),
                    ("tokens", tokens.is_some()),
                ];
                let given: Vec<&str> =
                    given.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
                return Err(Error::new("a request has exactly one prompt")
                    .expected("one of messages, text and tokens")
                    .got(if given.is_empty() { "none".into() } else { given.join(" and ") }));
            }
        };
        self.check_size(prompt)
    }

    fn render_messages(&self, messages: &[Message], request: &Request) -> Result<Prompt> {
        let Some(template) = &self.template else {
            let reason = self.no_template.as_deref().unwrap_or("it has none");
            return Err(Error::new(format!("the model's chat template cannot be used: {reason}"))
                .at("messages")
                .hint("give the whole prompt as `text`"));
        };
        let messages = with_system(messages, request.system.as_deref())?;
        check_roles(&messages)?;
        let open = messages.last().is_some_and(|message| message.role == "assistant");
        let prefill = request.prefill.as_deref().filter(|prefill| !prefill.is_empty());
        if let (true, Some(_)) = (open, prefill) {
            return Err(Error::new("a prefill after a final assistant message")
                .at("prefill")
                .hint("write it at that message's end: it is continued"));
        }
        let settings = Settings {
            thinking: request.thinking,
            date: request.date.as_deref().map(Date::parse).transpose()?,
        };
        let rendered = template.render(&messages, &settings)?;
        let mut turns: Vec<PlacedTurn> = messages
            .iter()
            .zip(rendered.turns)
            .map(|(message, range)| PlacedTurn { role: message.role.clone(), range })
            .collect();
        let mut text = rendered.text;
        if let Some(prefill) = prefill {
            let range = Some(text.len()..text.len() + prefill.len());
            turns.push(PlacedTurn { role: "assistant".into(), range });
            text.push_str(prefill);
        }
        self.tokenise(text, false, turns).map_err(|error| error.at("messages"))
    }

    fn tokenise(&self, text: String, special: bool, turns: Vec<PlacedTurn>) -> Result<Prompt> {
        let Some(tokenizer) = &self.tokenizer else {
            let reason = self.no_tokenizer.as_deref().unwrap_or("it has none");
            return Err(Error::new(format!("the model's tokenizer cannot be used: {reason}"))
                .at(self.name.clone())
                .hint("give the prompt as `tokens`"));
        };
        let encoding = tokenizer.encode(&text, special)?;
        let largest = encoding.tokens.iter().max().copied().unwrap_or(0);
        if largest as usize >= self.config.vocab {
            return Err(Error::new("the tokenizer does not fit the model")
                .expected(format!("token ids below {}", self.config.vocab))
                .got(largest));
        }
        let pieces = pieces(Some(tokenizer), &encoding.tokens);
        Ok(Prompt::new(text, encoding, pieces, turns))
    }

    fn take_tokens(&self, tokens: &[u32], request: &Request) -> Result<Prompt> {
        if request.prefill.is_some() {
            return Err(Error::new("a prefill is text, the prompt token ids")
                .at("prefill")
                .hint("append the prefill's token ids to `tokens`"));
        }
        let vocab = self.config.vocab;
        let unknown = tokens.iter().enumerate().find(|(_, token)| **token as usize >= vocab);
        if let Some((index, token)) = unknown {
            return Err(Error::new("a token id is outside the vocabulary")
                .at(format!("tokens[{index}]"))
                .expected(format!("0..={}", vocab - 1))
                .got(token));
        }
        Ok(Prompt::of_tokens(tokens.to_vec(), pieces(self.tokenizer.as_deref(), tokens)))
    }

    fn check_size(&self, prompt: Prompt) -> Result<Prompt> {
        let (n, context) = (prompt.tokens.len(), self.config.context);
        if n == 0 {
            return Err(Error::new("an empty prompt").expected("at least one token"));
        }
        if n > context {
            return Err(Error::new("the prompt is longer than the model's context")
                .expected(format!("at most {context} tokens"))
                .got(n));
        }
        Ok(prompt)
    }
}

fn pieces(tokenizer: Option<&Tokenizer>, tokens: &[u32]) -> Vec<String> {
    let piece = |token: &u32| match tokenizer {
        Some(tokenizer) => tokenizer.piece(*token),
        None => format!("<{token}>"),
    };
    tokens.iter().map(piece).collect()
}

/// What only a chat template can honour.
fn refuse_chat_options(request: &Request) -> Result<()> {
    let options = [
        ("system", request.system.is_some()),
        ("thinking", request.thinking != Thinking::Template),
        ("date", request.date.is_some()),
    ];
    match options.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((name, _)) => Err(Error::new(format!("`{name}` needs `messages`")).at(*name)),
    }
}

fn with_system(messages: &[Message], system: Option<&str>) -> Result<Vec<Message>> {
    let Some(system) = system else { return Ok(messages.to_vec()) };
    if messages.first().is_some_and(|message| message.role == "system") {
        return Err(Error::new("two system messages")
            .at("system")
            .expected("either `system` or a first message of role system"));
    }
    let first = Message { role: "system".into(), content: system.to_owned() };
    Ok([first].into_iter().chain(messages.iter().cloned()).collect())
}

fn check_roles(messages: &[Message]) -> Result<()> {
    if messages.iter().all(|message| message.role == "system") {
        return Err(Error::new("no messages").at("messages").expected("a user's at least"));
    }
    let known = ["system", "user", "assistant"];
    match messages.iter().find(|message| !known.contains(&message.role.as_str())) {
        None => Ok(()),
        Some(message) => Err(Error::new("unknown role of a message")
            .at("messages")
            .expected(known.join(", "))
            .got(format!("{:?}", message.role))),
    }
}
