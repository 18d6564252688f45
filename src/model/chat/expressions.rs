//! How long the expressions of a template are, found as minijinja's lexer finds them: it folds the
//! constants of a chain of operators again for each of them.

/// The squares of all tags' numbers of tokens, summed.
pub(super) fn work(source: &str) -> u64 {
    let (mut rest, mut work) = (source.as_bytes(), 0);
    while let Some(at) = position(rest, |pair| matches!(pair, b"{{" | b"{%" | b"{#")) {
        let (start, inner) = (&rest[at..at + 2], &rest[at + 2..]);
        let (tokens, length) = match start {
            b"{#" => (0, position(inner, |pair| pair == b"#}").map_or(inner.len(), |end| end + 2)),
            b"{%" => match basic_tag(inner, b"raw") {
                Some(length) => (0, length + raw(&inner[length..])),
                None => tag(inner, b"%}"),
            },
            _ => tag(inner, b"}}"),
        };
        work += tokens * tokens;
        rest = &inner[length..];
    }
    work
}

fn position(bytes: &[u8], is: impl Fn(&[u8]) -> bool) -> Option<usize> {
    bytes.windows(2).position(is)
}

/// Tokens up to the end of a tag, and the bytes up to behind it. Inside brackets there is no end.
fn tag(bytes: &[u8], end: &[u8]) -> (u64, usize) {
    let (mut at, mut tokens, mut brackets, mut in_word) = (0, 0, 0_i64, false);
    while at < bytes.len() {
        if brackets == 0 && bytes[at..].starts_with(end) {
            return (tokens, at + end.len());
        }
        let byte = bytes[at];
        match byte {
            b'(' | b'[' | b'{' => brackets += 1,
            b')' | b']' | b'}' => brackets -= 1,
            b'"' | b'\'' => at += string(&bytes[at + 1..], byte),
            _ => {}
        }
        let is_word = byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80;
        let is_blank = byte.is_ascii_whitespace();
        tokens += u64::from(!(is_blank || is_word && in_word));
        in_word = is_word;
        at += 1;
    }
    (tokens, bytes.len())
}

/// Bytes of a string behind its opening quote.
fn string(bytes: &[u8], quote: u8) -> usize {
    let mut escaped = false;
    let end = bytes.iter().position(|byte| {
        let ends = !escaped && *byte == quote;
        escaped = !escaped && *byte == b'\\';
        ends
    });
    end.map_or(bytes.len(), |end| end + 1)
}

/// Bytes of a raw block behind its first tag.
fn raw(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(start) = position(&bytes[at..], |pair| pair == b"{%") {
        at += start + 2;
        if let Some(length) = basic_tag(&bytes[at..], b"endraw") {
            return at + length;
        }
    }
    bytes.len()
}

/// Bytes of a tag with this word only, behind its `{%`.
fn basic_tag(bytes: &[u8], word: &[u8]) -> Option<usize> {
    let sign = |rest: &[u8]| usize::from(matches!(rest.first(), Some(b'-' | b'+')));
    let blanks = |rest: &[u8]| rest.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
    let mut at = sign(bytes);
    at += blanks(&bytes[at..]);
    at += bytes[at..].starts_with(word).then_some(word.len())?;
    at += blanks(&bytes[at..]);
    at += sign(&bytes[at..]);
    bytes[at..].starts_with(b"%}").then_some(at + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_tags_are_counted() {
        for (source, want) in [
            ("no tag at all {", 0),
            ("{{ a.b }} {%- if x == 'a long text' -%}", 3 * 3 + 7 * 7),
            ("{# 1+1 #}{{ 1+1 }}", 9),
            ("{{ {'a': {}}}}{{ x }}", 36 + 1),
            ("{{ 'it\\'s }}' }}{{ \"a'b\" }}", 1 + 1),
            ("{% raw %}{{ a+a+a '{% endraw %}{{ x }}{%- raw -%}{{{%- endraw %}{{ y }}", 2),
            ("{{ never closed", 4),
        ] {
            assert_eq!(work(source), want, "{source}");
        }
    }
}
