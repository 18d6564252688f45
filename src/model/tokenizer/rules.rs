//! How byte-level vocabularies cut text before merging, by llama.cpp's names
//! (`tokenizer.ggml.pre`). The expressions are those of the models' own `tokenizer.json`.

use serde_json::{Value, json};

/// What a name in a GGUF file stands for.
pub(super) struct Rules {
    names: &'static [&'static str],
    cut: Cut,
    /// Characters are composed first.
    nfc: bool,
    /// A piece that is a token stays whole, whatever the merges say.
    pub ignore_merges: bool,
    /// A BOS goes first where the file does not say otherwise.
    pub add_bos: bool,
}

enum Cut {
    /// GPT-2's expression, which the library has built in.
    Gpt2,
    /// Digits one by one, then likewise.
    DigitsThenGpt2,
    /// An expression that matches all of any text.
    Pattern(&'static str),
}

const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Mistral's, in words that change from small to capital letters.
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// o200k: likewise, with contractions at a word's end and up to three digits.
const GPT_4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

impl Rules {
    const fn new(names: &'static [&'static str], cut: Cut) -> Self {
        Self { names, cut, nfc: false, ignore_merges: false, add_bos: false }
    }

    const fn with_nfc(mut self) -> Self {
        self.nfc = true;
        self
    }

    /// Whole words first and a BOS: what llama.cpp takes for granted of Llama 3 and Mistral.
    const fn with_whole_words(mut self) -> Self {
        self.ignore_merges = true;
        self.add_bos = true;
        self
    }
}

const RULES: [Rules; 9] = [
    Rules::new(&["gpt-2", "phi-2"], Cut::Gpt2),
    // OLMo's first models: GPT-NeoX's vocabulary.
    Rules::new(&["olmo"], Cut::Gpt2).with_nfc(),
    // Granite 3 is a refact.
    Rules::new(&["smollm", "starcoder", "refact"], Cut::DigitsThenGpt2),
    Rules::new(&["command-r"], Cut::DigitsThenGpt2).with_nfc(),
    Rules::new(&["llama-bpe", "llama3", "llama-v3"], Cut::Pattern(LLAMA3)).with_whole_words(),
    // Phi-4 and OLMo 2 have this vocabulary (cl100k), too.
    Rules::new(&["dbrx"], Cut::Pattern(LLAMA3)),
    Rules::new(&["qwen2", "deepseek-r1-qwen"], Cut::Pattern(QWEN2)).with_nfc(),
    Rules::new(&["tekken"], Cut::Pattern(TEKKEN)).with_whole_words(),
    Rules::new(&["gpt-4o"], Cut::Pattern(GPT_4O)),
];

/// The rules of a name.
pub(super) fn find(name: &str) -> Option<&'static Rules> {
    RULES.iter().find(|rules| rules.names.contains(&name))
}

/// All names, for a message.
pub(super) fn names() -> String {
    RULES.iter().flat_map(|rules| rules.names).copied().collect::<Vec<_>>().join(", ")
}

impl Rules {
    /// The normalizer of a `tokenizer.json`.
    pub(super) fn normalizer(&self) -> Value {
        if self.nfc { json!({"type": "NFC"}) } else { Value::Null }
    }

    /// The pre-tokenizer of a `tokenizer.json`.
    pub(super) fn pre_tokenizer(&self) -> Value {
        let first = match self.cut {
            Cut::Gpt2 => return byte_level(true),
            Cut::DigitsThenGpt2 => json!({"type": "Digits", "individual_digits": true}),
            Cut::Pattern(pattern) => json!({
                "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                "invert": false
            }),
        };
        let second = byte_level(matches!(self.cut, Cut::DigitsThenGpt2));
        json!({"type": "Sequence", "pretokenizers": [first, second]})
    }
}

/// Bytes as characters; `use_regex`: cut by GPT-2's expression before.
pub(super) fn byte_level(use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
        "use_regex": use_regex
    })
}

#[cfg(test)]
mod tests {
    use tokenizers::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper,
    };

    use super::*;

    fn pre_tokenizer(name: &str) -> PreTokenizerWrapper {
        serde_json::from_value(find(name).unwrap().pre_tokenizer()).unwrap()
    }

    /// Where the pieces of a text end, in bytes.
    fn ends(cut: &PreTokenizerWrapper, text: &str) -> Vec<usize> {
        let mut pieces = PreTokenizedString::from(text);
        cut.pre_tokenize(&mut pieces).unwrap();
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.iter().map(|(_, (_, to), _)| *to).collect()
    }

    #[test]
    fn text_is_cut_by_the_rules_of_its_name() {
        let text = "I'm 1234\n\n  x";
        let cases: [(&str, &[&str]); 5] = [
            ("gpt-2", &["I", "'m", " 1234", "\n\n ", " x"]),
            ("smollm", &["I", "'m", " ", "1", "2", "3", "4", "\n\n ", " x"]),
            ("llama-bpe", &["I", "'m", " ", "123", "4", "\n\n", " ", " x"]),
            ("qwen2", &["I", "'m", " ", "1", "2", "3", "4", "\n\n", " ", " x"]),
            ("gpt-4o", &["I'm", " ", "123", "4", "\n\n", " ", " x"]),
        ];
        for (name, want) in cases {
            let mut start = 0;
            let mut got = Vec::new();
            for end in ends(&pre_tokenizer(name), text) {
                got.push(&text[start..end]);
                start = end;
            }
            assert_eq!(got, want, "{name}");
        }
        assert!(find("viking").is_none() && find("default").is_none());
    }

    /// By another engine for regular expressions, Oniguruma, which the Python package has
    /// (`scripts/make_golden_vocabularies.py`).
    #[test]
    fn awkward_texts_are_cut_as_the_reference_cuts_them() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/vocabularies/cuts.json");
        let golden: Value = serde_json::from_slice(&fs_err::read(path).unwrap()).unwrap();
        let texts: Vec<&str> =
            golden["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
        assert!(texts.len() > 200);
        for rules in &RULES {
            let want = golden["ends"][rules.names[0]].as_array().unwrap();
            for name in rules.names {
                let cut = pre_tokenizer(name);
                for (text, want) in texts.iter().zip(want) {
                    assert_eq!(json!(ends(&cut, text)), *want, "{name}: {text:?}");
                }
            }
        }
    }
}
