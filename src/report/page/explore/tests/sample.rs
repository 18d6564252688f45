//! A made-up run of any size.

use std::fmt::Write as _;

use super::Row;

const WORDS: &str = "the a of in it is that my mind I notice something seems to be no thought yes \
    perhaps there about which while quiet bright water paper distant kind strange question answer model \
    think looking feel word not any sense of pattern around edges could say with certain clear \
    slowly because usual sentence first second attention shape and then simply however place \
    memory light door garden";
const CONCEPTS: usize = 50;
const DOSES: [f64; 5] = [0.125, 0.25, 0.5, 1.0, 2.0];
const ARMS: [&str; 4] = ["concept", "random", "other", "after"];
const NAMES: [&str; 4] = ["coherent", "claims", "mentions", "claims_then_names"];

/// xorshift64*.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}

/// A row that owns its texts.
pub struct Owned {
    pub id: String,
    pub prompt: &'static str,
    pub condition: &'static str,
    pub concept: String,
    pub other: String,
    pub sentence: String,
    pub layer: Option<usize>,
    pub dose: Option<f64>,
    pub text: String,
    pub verdicts: Vec<(&'static str, bool, String)>,
    pub success: Option<bool>,
}

impl Owned {
    pub fn row(&self) -> Row<'_> {
        Row {
            id: &self.id,
            part: "sampled",
            prompt: self.prompt,
            condition: self.condition,
            concept: &self.concept,
            other: &self.other,
            sentence: &self.sentence,
            layer: self.layer,
            dose: self.dose,
            repeat: 0,
            text: &self.text,
            cut: true,
            verdicts: self.verdicts.iter().map(|v| (v.0, v.1, v.2.as_str())).collect(),
            success: self.success,
        }
    }
}

/// Replies of about 450 characters, no two the same, four verdicts with evidence each.
pub fn rows(n: usize) -> Vec<Owned> {
    let words: Vec<_> = WORDS.split_whitespace().collect();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    (0..n)
        .map(|at| {
            let clean = at % 10 == 0;
            let condition = if clean { "clean" } else { ARMS[random.below(ARMS.len())] };
            let concept = random.below(CONCEPTS);
            let hit =
                condition == "concept" && random.below(CONCEPTS) < concept || random.below(20) == 0;
            let mut text = String::new();
            while text.len() < 440 {
                let word = words[random.below(words.len())];
                let end = [". ", ", ", " ", " ", " ", " "][random.below(6)];
                text.extend([word, end]);
            }
            if hit {
                let _ = write!(text, "It is Concept{concept:02}.");
            }
            let verdict = |name: &'static str, yes: bool| {
                let evidence = match name {
                    "coherent" => {
                        format!("{:.3} nats, at most {:.3}", text.len() as f64 / 200.0, 4.0)
                    }
                    "claims" => format!("\"I notice something\" at byte {}", at % 400),
                    "mentions" if yes => {
                        format!("\"concept\" at byte {} (reply {at})", text.len() - 11)
                    }
                    "mentions" => "no form of the word".into(),
                    _ => format!("the claim at byte {} comes before the mention", at % 397),
                };
                (name, yes, evidence)
            };
            Owned {
                id: format!("{:016x}{at:016x}", random.0),
                prompt: ["cued", "open"][at % 2],
                condition,
                concept: format!("Concept{concept:02}"),
                other: if condition == "other" {
                    format!("Concept{:02}", (concept + 7) % CONCEPTS)
                } else {
                    String::new()
                },
                sentence: format!("The meeting number {concept} was moved to the following week."),
                layer: (!clean).then(|| 6 * random.below(5)),
                dose: (!clean).then(|| DOSES[random.below(DOSES.len())]),
                verdicts: NAMES.map(|name| verdict(name, hit || name == "coherent")).into(),
                success: Some(hit),
                text,
            }
        })
        .collect()
}
