//! Chat templates: messages to the text that the model was trained on, as transformers renders it.

mod bounds;
mod expressions;

use std::{collections::BTreeMap, ops::Range};

use minijinja::{
    Environment, ErrorKind, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde},
};
use serde::Serialize;

use super::date::Date;
use crate::{
    error::{Error, Result},
    request::{Message, Thinking},
};

/// A model's chat template, parsed.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    /// `bos_token`, `eos_token` and others, by those names.
    special: BTreeMap<String, String>,
}

/// What a template is rendered with besides the messages.
#[derive(Clone, Debug, Default)]
pub(super) struct Settings {
    /// `enable_thinking`.
    pub thinking: Thinking,
    /// What `strftime_now` says.
    pub date: Option<Date>,
}

/// A rendered chat. A final assistant message is left open: the text ends with it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rendered {
    /// The whole text.
    pub text: String,
    /// Where each message's content stands in it; `None` where that cannot be told.
    pub turns: Vec<Option<Range<usize>>>,
}

const NAME: &str = "chat";
/// Set around contents to find them again: characters for private use that nobody writes.
const OPEN: char = '\u{f5a1}';
const CLOSE: char = '\u{f5a2}';
/// Set after a message that is to be continued. The blank shows whether the template trims.
const TAG: &str = "\u{f5a3} ";

impl ChatTemplate {
    /// Parses a template. `special`: the special tokens by their names in templates.
    pub(super) fn new(source: &str, special: BTreeMap<String, String>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| Error::new(format!("chat template: {error}")))?;
        environment.set_syntax(syntax);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", |message: String| -> Refusal {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        let template = without_generation(source);
        bounds::parsing(&template.clone(), || environment.add_template_owned(NAME, template))?
            .map_err(|error| Error::new(format!("the chat template cannot be parsed: {error}")))?;
        Ok(Self { environment, source: source.to_owned(), special })
    }

    /// Another template with the same special tokens.
    pub(super) fn with_source(&self, source: &str) -> Result<Self> {
        Self::new(source, self.special.clone())
    }

    /// Renders messages with the generation prompt, or, where the last one is the assistant's,
    /// without it and up to that message's end.
    pub(super) fn render(&self, messages: &[Message], settings: &Settings) -> Result<Rendered> {
        if settings.thinking != Thinking::Template && !self.source.contains("enable_thinking") {
            return Err(Error::new("the model's chat template has no thinking switch")
                .at("thinking")
                .expected("template"));
        }
        let open = messages.last().is_some_and(|message| message.role == "assistant");
        let text = if open {
            self.render_open(messages, settings)?
        } else {
            self.render_text(messages, settings, true)?
        };
        let turns = self.locate(messages, settings, open, &text);
        Ok(Rendered { text, turns })
    }

    /// As transformers' `continue_final_message`: a tag after the message shows where it ends, and
    /// whether the template trims it.
    fn render_open(&self, messages: &[Message], settings: &Settings) -> Result<String> {
        let mut tagged = messages.to_vec();
        if let Some(last) = tagged.last_mut() {
            last.content.push_str(TAG);
        }
        let mut text = self.render_text(&tagged, settings, false)?;
        let at = text.rfind(TAG.trim_end()).ok_or_else(|| {
            Error::new(
                "the chat template drops the final assistant message: it cannot be continued",
            )
            .at("messages")
        })?;
        if text.matches(TAG.trim_end()).count() > 1 {
            let what = "the chat template prints the final assistant message more than once";
            return Err(Error::new(format!("{what}: it cannot be continued")).at("messages"));
        }
        let trims = !text[at..].starts_with(TAG);
        text.truncate(at);
        if trims {
            text.truncate(text.trim_end().len());
        }
        Ok(text)
    }

    fn render_text(
        &self,
        messages: &[Message],
        settings: &Settings,
        generation_prompt: bool,
    ) -> Result<String> {
        let mut context: BTreeMap<String, Value> =
            self.special.iter().map(|(name, token)| (name.clone(), token.into())).collect();
        context.insert("messages".into(), Value::from(Serde(messages)));
        context.insert("tools".into(), ().into());
        context.insert("documents".into(), ().into());
        context.insert("add_generation_prompt".into(), generation_prompt.into());
        if settings.thinking != Thinking::Template {
            let on = settings.thinking == Thinking::On;
            context.insert("enable_thinking".into(), on.into());
        }
        let fuel = bounds::fuel(messages);
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let date = settings.date;
        let now = move |format: String| strftime_now(date, &format);
        context.insert("strftime_now".into(), Value::from_function(now));
        let render = move || environment.get_template(NAME)?.render(context);
        let rendered = bounds::rendering(fuel, render)?;
        rendered.map_err(|error| refused(&error))
    }

    /// Finds the contents in `text` by rendering once more with marks around them: what stands
    /// between the marks is what the template adds, and `text` must be that with each content, as
    /// it is or trimmed, in the gaps.
    fn locate(
        &self,
        messages: &[Message],
        settings: &Settings,
        open: bool,
        text: &str,
    ) -> Vec<Option<Range<usize>>> {
        let mut turns = vec![None; messages.len()];
        let marked: Vec<Message> = messages
            .iter()
            .map(|Message { role, content }| Message {
                role: role.clone(),
                content: format!("{OPEN}{content}{CLOSE}"),
            })
            .collect();
        let Ok(frame) = self.render_text(&marked, settings, !open) else { return turns };
        let Some(gaps) = gaps(&frame, messages) else { return turns };

        let Some(mut rest) = text.strip_prefix(gaps[0]) else { return turns };
        for (index, message) in messages.iter().enumerate() {
            let last = index + 1 == messages.len();
            let fits = |after: &str| match (last, open) {
                (false, _) => after.starts_with(gaps[index + 1]),
                (true, true) => after.is_empty(),
                (true, false) => after == gaps[index + 1],
            };
            let Some(content) = variants(&message.content)
                .into_iter()
                .find(|content| rest.strip_prefix(content).is_some_and(fits))
            else {
                return turns;
            };
            let start = text.len() - rest.len();
            turns[index] = Some(start..start + content.len());
            rest = &rest[content.len()..];
            if !last {
                rest = &rest[gaps[index + 1].len()..];
            }
        }
        turns
    }
}

/// A template with transformers' own `generation` blocks, which mark what the assistant wrote and
/// print what is inside, as conditions that hold: blanks around the tags are then treated alike.
fn without_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let end = tag.find("%}").unwrap_or(tag.len());
        let inner = &tag[2..end.max(2)];
        let name = inner.trim_matches(['-', '+']).trim();
        match name {
            "generation" => out.push_str(&tag[..end].replace(name, "if true")),
            "endgeneration" => out.push_str(&tag[..end].replace(name, "endif")),
            _ => out.push_str(&tag[..end]),
        }
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

type Refusal = std::result::Result<Value, minijinja::Error>;

/// What a template adds before, between and after the marked contents; `None` unless each stands in
/// the text once and in order, untouched inside.
fn gaps<'a>(frame: &'a str, messages: &[Message]) -> Option<Vec<&'a str>> {
    if messages.iter().any(|message| message.content.contains([OPEN, CLOSE])) {
        return None;
    }
    let mut gaps = Vec::new();
    let mut rest = frame;
    for message in messages {
        let (before, after) = rest.split_once(OPEN)?;
        gaps.push(before);
        rest = after.strip_prefix(message.content.as_str())?.strip_prefix(CLOSE)?;
    }
    gaps.push(rest);
    (!rest.contains([OPEN, CLOSE])).then_some(gaps)
}

/// A content as templates may print it, longest first.
fn variants(content: &str) -> [&str; 4] {
    [content, content.trim_start(), content.trim_end(), content.trim()]
}

fn refused(error: &minijinja::Error) -> Error {
    let detail = error.detail().map_or_else(|| error.to_string(), str::to_owned);
    Error::new("the chat template cannot render these messages").at("messages").got(detail)
}

fn strftime_now(date: Option<Date>, format: &str) -> std::result::Result<String, minijinja::Error> {
    let problem = |message: String| minijinja::Error::new(ErrorKind::InvalidOperation, message);
    let date = date.ok_or_else(|| {
        problem("the template prints today's date: pin it with `date`, as \"2025-01-31\"".into())
    })?;
    date.format(format).map_err(problem)
}

/// JSON as Python's `json.dumps(ensure_ascii=False)` writes it.
#[expect(clippy::needless_pass_by_value, reason = "the template engine passes it so")]
fn tojson(value: &Value, options: Kwargs) -> std::result::Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
        Some(indent) => {
            let indent = " ".repeat(indent.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty))
        }
    };
    let problem = |error: String| minijinja::Error::new(ErrorKind::BadSerialization, error);
    written.map_err(|error| problem(error.to_string()))?;
    String::from_utf8(out).map(Value::from_safe_string).map_err(|error| problem(error.to_string()))
}

/// `, ` and `: ` between entries.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// `ChatML` with a default system message.
    pub const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    pub fn message(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into() }
    }

    fn template(source: &str) -> ChatTemplate {
        let special = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
        ChatTemplate::new(source, special).unwrap()
    }

    fn render(source: &str, messages: &[Message]) -> Rendered {
        template(source).render(messages, &Settings::default()).unwrap()
    }

    fn contents(rendered: &Rendered) -> Vec<&str> {
        rendered.turns.iter().map(|turn| &rendered.text[turn.clone().unwrap()]).collect()
    }

    #[test]
    fn renders_with_a_generation_prompt_and_finds_the_turns() {
        let rendered = render(CHATML, &[message("user", " hi user ")]);
        let want = "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n hi user <|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(rendered.text, want);
        assert_eq!(contents(&rendered), [" hi user "]);
    }

    #[test]
    fn a_final_assistant_message_is_left_open() {
        let messages = [message("user", "hi"), message("assistant", "Ok. ")];
        let rendered = render(CHATML, &messages);
        assert!(rendered.text.ends_with("<|im_start|>assistant\nOk. "), "{}", rendered.text);
        assert_eq!(contents(&rendered), ["hi", "Ok. "]);
    }

    #[test]
    fn trimmed_contents_are_found_too() {
        let source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}\n{% endfor %}";
        let messages =
            [message("user", "  user  "), message("assistant", "user "), message("user", "")];
        let rendered = render(source, &messages);
        assert_eq!(rendered.text, "<s>[user]user\n[assistant]user\n[user]\n");
        assert_eq!(rendered.turns, [Some(9..13), Some(25..29), Some(36..36)]);
        let rendered = render(source, &messages[..2]);
        assert_eq!(rendered.text, "<s>[user]user\n[assistant]user");
        assert_eq!(contents(&rendered), ["user", "user"]);
    }

    #[test]
    fn a_turn_that_the_template_changes_is_not_located() {
        let source = "{% for m in messages %}{{ m.content.replace('x', 'y') }};{% endfor %}";
        let rendered = render(source, &[message("user", "a"), message("user", "x")]);
        assert_eq!(rendered.text, "a;y;");
        assert_eq!(rendered.turns, [None, None]);
    }

    #[test]
    fn the_template_may_refuse() {
        let source = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}";
        let error = template(source).render(&[message("system", "x")], &Settings::default());
        assert!(error.unwrap_err().to_string().contains("System role not supported"));
        let error = ChatTemplate::new("{% if %}", BTreeMap::new()).unwrap_err().to_string();
        assert!(error.contains("cannot be parsed"), "{error}");
    }

    #[test]
    fn the_date_must_be_pinned() {
        let template = template("{{ strftime_now('%d %b %Y') }}");
        let messages = [message("user", "x")];
        let error = template.render(&messages, &Settings::default()).unwrap_err().to_string();
        assert!(error.contains("pin it with `date`"), "{error}");
        let date = Some(Date::parse("2025-01-31").unwrap());
        let settings = Settings { date, ..Settings::default() };
        assert_eq!(template.render(&messages, &settings).unwrap().text, "31 Jan 2025");
    }

    #[test]
    fn a_final_message_that_is_printed_twice_is_not_continued() {
        let source = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}";
        let template = ChatTemplate::new(source, BTreeMap::new()).unwrap();
        let message = |role: &str| Message { role: role.into(), content: "x".into() };
        let messages = [message("user"), message("assistant")];
        let error = template.render(&messages, &Settings::default()).unwrap_err().to_string();
        assert!(error.contains("more than once"), "{error}");
    }

    #[test]
    fn generation_blocks_print_what_is_inside() {
        let source = "{%- generation -%}\n a{{ 1 }}\n{%- endgeneration %}\n{% if x %}b{% endif %}c";
        let want = "{%- if true -%}\n a{{ 1 }}\n{%- endif %}\n{% if x %}b{% endif %}c";
        assert_eq!(without_generation(source), want);
        let untouched = "{% set generation = 1 %}{{ '{%' }}é";
        assert_eq!(without_generation(untouched), untouched);
    }

    #[test]
    fn thinking_is_a_switch_or_undefined() {
        let source = "{% if enable_thinking is defined %}{{ 'on' if enable_thinking else 'off' }}{% else %}unset{% endif %}";
        let messages = [message("user", "x")];
        for (thinking, want) in
            [(Thinking::On, "on"), (Thinking::Off, "off"), (Thinking::Template, "unset")]
        {
            let settings = Settings { thinking, date: None };
            assert_eq!(template(source).render(&messages, &settings).unwrap().text, want);
        }
        let settings = Settings { thinking: Thinking::On, date: None };
        let error = template(CHATML).render(&messages, &settings).unwrap_err().to_string();
        assert!(error.contains("no thinking switch"), "{error}");
    }

    #[test]
    fn python_idioms_of_templates_work() {
        let source = "{%- set ns = namespace(n=0) -%}\n{%- for m in messages[::-1] -%}\n    {%- if m['content'].startswith('<') and not loop.last -%}\n        {%- set ns.n = ns.n + 1 -%}\n    {%- endif -%}\n{%- endfor -%}\n{{ ns.n }} {{ messages[0].content.split('|')[-1].strip() }} {{ {'a': [1, '<é>']} | tojson }}";
        let rendered = render(source, &[message("user", "a| b "), message("user", "<x>")]);
        assert_eq!(rendered.text, "1 b {\"a\": [1, \"<é>\"]}");
    }
}
