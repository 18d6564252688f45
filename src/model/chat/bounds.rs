//! How much time, memory and stack a chat template may take: it comes with a model and may be
//! anything.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use super::expressions;
use crate::{
    error::{Error, Result},
    request::Message,
};

/// Bytes of a template. The longest in use have a sixth of it.
const MAX_SOURCE: usize = 1 << 18;
/// One expression of 4,096 tokens, or 6,500 of 50 as in real templates.
const MAX_WORK: u64 = 1 << 24;
/// Parsing takes stack with the length of the longest expression or `elif` chain: at most 0.7 KiB
/// for each byte of it, measured with chains of every operator.
const STACK_PER_BYTE: usize = 1 << 10;
/// Rendering takes stack with the depth of the values made: at most 0.5 KiB for each unit of fuel,
/// measured with lists in lists that are printed.
const STACK_PER_FUEL: usize = 1 << 10;
const LEAST_STACK: usize = 1 << 21;
/// Fuel is minijinja's measure: an instruction, or 64 bytes of text or values made.
const LEAST_FUEL: u64 = 100_000;
const FUEL_PER_MESSAGE: u64 = 1_000;
const MAX_FUEL: u64 = 1 << 20;
/// All fuel is used in a tenth of a second.
const MOST_TIME: Duration = Duration::from_secs(if cfg!(any(test, fuzzing)) { 3 } else { 10 });

/// What a rendering may take. Each byte of the messages' texts may be handled 16 times.
pub(super) fn fuel(messages: &[Message]) -> u64 {
    let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
    let fuel = LEAST_FUEL + FUEL_PER_MESSAGE * messages.len() as u64 + bytes as u64 / 4;
    fuel.min(MAX_FUEL)
}

/// Parses a template, on a stack that is deep enough.
pub(super) fn parsing<T: Send>(source: &str, job: impl FnOnce() -> T + Send) -> Result<T> {
    if source.len() > MAX_SOURCE {
        return Err(Error::new("the chat template is too long")
            .expected(format!("at most {MAX_SOURCE} bytes"))
            .got(source.len()));
    }
    let work = expressions::work(source);
    if work > MAX_WORK {
        return Err(Error::new("the chat template's expressions are too long")
            .expected(format!(
                "at most {MAX_WORK} (the squares of their numbers of tokens, summed)"
            ))
            .got(work));
    }
    thread::scope(|scope| {
        let thread = on_stack(source.len() * STACK_PER_BYTE).spawn_scoped(scope, job)?;
        thread.join().map_err(|_| failed())
    })
}

/// Renders with so much fuel, likewise, for a limited time: fuel is not charged for the parts of a
/// list that holds another twice, which holds another twice, and so on. A rendering that takes longer
/// is left to itself: the error ends what asked for it.
pub(super) fn rendering<T: Send + 'static>(
    fuel: u64,
    job: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = mpsc::channel();
    let thread = on_stack(fuel as usize * STACK_PER_FUEL);
    thread.spawn(move || drop(sender.send(job())))?;
    match receiver.recv_timeout(MOST_TIME) {
        Ok(rendered) => Ok(rendered),
        Err(RecvTimeoutError::Timeout) => Err(Error::new("the chat template takes too long")
            .at("messages")
            .expected(format!("at most {} s", MOST_TIME.as_secs()))
            .hint("the template is damaged, or made to take time")),
        Err(RecvTimeoutError::Disconnected) => Err(failed()),
    }
}

/// A panic of the library, whose message is printed.
fn failed() -> Error {
    Error::new("the template library failed")
        .at("messages")
        .hint("the chat template is damaged, or asks for what the library cannot do")
}

/// Memory is taken only for the part of a stack that is used.
fn on_stack(bytes: usize) -> thread::Builder {
    thread::Builder::new().name("chat template".into()).stack_size(bytes.max(LEAST_STACK))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::{ChatTemplate, Settings, tests::message};

    fn template(source: &str) -> crate::error::Result<ChatTemplate> {
        ChatTemplate::new(source, BTreeMap::new())
    }

    #[test]
    fn long_chains_are_parsed_on_a_stack_that_is_deep_enough() {
        for (start, link, tokens, end) in [
            ("{{ 1", "+a", 2, " }}"),
            ("{{ a", "**a", 3, " }}"),
            ("{{ ", "not ", 1, "1 }}"),
            ("{{ ", "-", 1, "1 }}"),
            ("{{ a", ".b", 2, " }}"),
            ("{{ a", "|e", 2, " }}"),
            ("{{ ", "a if a else ", 4, "a }}"),
            ("{% if a %}", "{%elif a%}", 0, "{% endif %}"),
        ] {
            // Chains of `elif` are of any length, others are one expression.
            let count = 4_000_usize.checked_div(tokens).unwrap_or(20_000);
            let source = format!("{start}{}{end}", link.repeat(count));
            let parsed = template(&source).unwrap();
            drop(parsed.render(&[message("user", "x")], &Settings::default()));
            if tokens > 0 {
                let source = format!("{start}{}{end}", link.repeat(2 * count));
                let error = template(&source).unwrap_err().to_string();
                assert!(error.contains("expressions are too long"), "{link}: {error}");
            }
        }
        let error = template(&"x".repeat(300_000)).unwrap_err().to_string();
        assert!(error.contains("too long") && error.contains("300000"), "{error}");
    }

    #[test]
    fn a_rendering_without_end_runs_out_of_fuel() {
        let deep = format!("{}ns.x{}", "[".repeat(60), "]".repeat(60));
        for (times, change, shown) in [
            (60, "ns.x ~ ns.x ~ 'a'", "ns.x"),
            (1_400, deep.as_str(), "ns.x"),
            (1_400, deep.as_str(), "ns.x|tojson"),
            (30_000, deep.as_str(), "ns.x"),
        ] {
            let source = format!(
                "{{% set ns = namespace(x='') %}}{{% for i in range({times}) %}}{{% set ns.x = {change} %}}\
                 {{% endfor %}}{{{{ {shown} }}}}"
            );
            let parsed = template(&source).unwrap();
            let rendered = parsed.render(&[message("user", "x")], &Settings::default());
            if let Err(error) = rendered {
                assert!(error.to_string().contains("fuel"), "{error}");
            }
        }
    }

    #[test]
    fn a_panic_of_the_library_is_an_error() {
        let wide = template("{{ '%.70000f' | format(7) }}").unwrap();
        let error = wide.render(&[message("user", "x")], &Settings::default()).unwrap_err();
        assert!(error.to_string().contains("library failed"), "{error}");
    }

    #[test]
    fn a_rendering_that_takes_long_is_given_up() {
        let source = "{% set ns = namespace(x=[], y=[]) %}{% for i in range(30) %}\
                      {% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}\
                      {{ ns.x == ns.y }}";
        let rendered =
            template(source).unwrap().render(&[message("user", "x")], &Settings::default());
        let error = rendered.unwrap_err().to_string();
        assert!(error.contains("too long") && error.contains("at most 3 s"), "{error}");
    }
}
