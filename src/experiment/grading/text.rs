//! A reply as a list of words, with where they stand.

use std::ops::Range;

/// One word: letters and digits of any script, apostrophes inside it included ("don't"). A capital
/// after a small letter begins a new one: injected replies run `SnowSnowSnow`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word {
    /// Lower-cased; a curly apostrophe is written straight.
    pub text: String,
    /// Byte range in the reply.
    pub span: Range<usize>,
    /// 0-based sentence: `.`, `!`, `?`, `:`, `;` and line breaks end one.
    pub sentence: usize,
    /// Whether a comma, dash, bracket or quotation mark stands between this word and the last one.
    pub after_break: bool,
}

/// The words of a text, in order.
pub fn words(text: &str) -> Vec<Word> {
    let mut words = Vec::new();
    let (mut sentence, mut pending_end, mut after_break) = (0, false, false);
    let mut rest = text.char_indices().peekable();
    while let Some((start, first)) = rest.next() {
        if !first.is_alphanumeric() {
            pending_end |= matches!(first, '.' | '!' | '?' | ':' | ';' | '\n');
            after_break |= !first.is_whitespace();
            continue;
        }
        let mut lower: String = first.to_lowercase().collect();
        let (mut end, mut last) = (start + first.len_utf8(), first);
        while let Some(&(at, char)) = rest.peek() {
            let inside = matches!(char, '\'' | '’')
                && text[at + char.len_utf8()..].chars().next().is_some_and(char::is_alphabetic);
            let seam = last.is_lowercase() && char.is_uppercase();
            if seam || (!char.is_alphanumeric() && !inside) {
                break;
            }
            if inside {
                lower.push('\'');
            } else {
                lower.extend(char.to_lowercase());
            }
            (end, last) = (at + char.len_utf8(), char);
            rest.next();
        }
        sentence += usize::from(std::mem::take(&mut pending_end) && !words.is_empty());
        let after_break = std::mem::take(&mut after_break);
        words.push(Word { text: lower, span: start..end, sentence, after_break });
    }
    words
}

/// Whether `words` begin with the words of `phrase` (lower-case, one space between); "'s" may
/// follow any of them.
pub fn starts_with(words: &[Word], phrase: &str) -> bool {
    let mut rest = words.iter();
    phrase.split(' ').all(|part| {
        rest.next().is_some_and(|word| {
            word.text == part || word.text.strip_suffix("'s").is_some_and(|stem| stem == part)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_keep_their_place_and_their_sentence() {
        let text = "“Yes, I don’t.” Él (volcano's)\nend";
        let list = words(text);
        let texts: Vec<&str> = list.iter().map(|w| w.text.as_str()).collect();
        assert_eq!(texts, ["yes", "i", "don't", "él", "volcano's", "end"]);
        assert_eq!(list.iter().map(|w| w.sentence).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 2]);
        assert!(list[1].after_break && !list[2].after_break && list[4].after_break);
        assert_eq!(&text[list[2].span.clone()], "don’t");
        assert_eq!(&text[list[3].span.clone()], "Él");
    }

    #[test]
    fn glued_words_are_taken_apart() {
        let texts: Vec<String> = words("SnowSnow iPhone DNA").into_iter().map(|w| w.text).collect();
        assert_eq!(texts, ["snow", "snow", "i", "phone", "dna"]);
    }

    #[test]
    fn a_phrase_is_matched_by_whole_words() {
        let list = words("Paper cranes, the volcano's rim; 'tis bread-like");
        assert!(starts_with(&list, "paper cranes") && !starts_with(&list, "paper crane"));
        assert!(starts_with(&list[3..], "volcano") && !starts_with(&list[3..], "volcan"));
        assert!(list.iter().any(|w| w.text == "bread"));
        assert!(!starts_with(&list[7..], "like this"));
    }
}
