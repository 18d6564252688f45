//! The headline in sentences.

use std::fmt;

use super::{Headline, Meaning, ReadHeadline, ReplyHeadline};
use crate::{
    experiment::stats::Difference,
    report::{
        format::{decimals, percent, points, rate, signed},
        tables::{Contrast, Progress},
    },
};

impl Headline {
    /// The paragraph, sentence by sentence.
    pub fn sentences(&self) -> Vec<String> {
        let mut all = Vec::new();
        let Progress { done, planned, ungraded, missing, .. } = self.progress;
        if done < planned {
            all.push(format!("This run is unfinished: {done} of {planned} trials."));
        }
        if ungraded > 0 {
            let verb = if ungraded == 1 { "reply has" } else { "replies have" };
            all.push(format!("{ungraded} {verb} no verdict yet and count nowhere."));
        }
        if missing > 0 {
            all.push(format!("{missing} verdicts are missing and count nowhere."));
        }
        all.extend(self.read.iter().flat_map(ReadHeadline::sentences));
        all.extend(self.replies.iter().flat_map(ReplyHeadline::sentences));
        all.extend(self.others.iter().cloned());
        let effect = self.replies.as_ref().and_then(|replies| replies.smallest_effect);
        let effect = effect.filter(|_| self.meaning != Meaning::Evidence).map(|effect| {
            format!(
                " The smallest H − F that this run could have seen is {} percentage points.",
                signed(effect)
            )
        });
        all.extend(self.conclusion().map(|text| text.to_owned() + &effect.unwrap_or_default()));
        all
    }

    /// What is set above everything else, and the other sentences.
    pub fn lead(&self) -> (String, Vec<String>) {
        let mut sentences = self.sentences();
        let lead = match (self.conclusion(), self.others.first()) {
            (None, Some(first)) => sentences.iter().position(|sentence| sentence == first),
            _ => sentences.len().checked_sub(1),
        };
        let lead = lead.map(|at| sentences.remove(at)).unwrap_or_default();
        (lead, sentences)
    }

    /// None where the run asks for something else than detection.
    fn conclusion(&self) -> Option<&'static str> {
        match self.meaning {
            Meaning::Open if !self.others.is_empty() => None,
            Meaning::Open => Some("Whether the model notices can't be said from what is here."),
            Meaning::NoEvidence => Some(
                "No evidence of detection: this model is too small, or does not do this. Run \
                 yours with `inkling run injected-thoughts --model PATH`.",
            ),
            Meaning::YesBias => Some(
                "Vectors push the model to yes, random ones as well: that is a bias towards yes, and no \
                 evidence of detection.",
            ),
            Meaning::NamesOnly => Some(
                "The concept comes out in the model's words, and the model does not notice: no evidence \
                 of detection. Run yours with `inkling run injected-thoughts --model PATH`.",
            ),
            Meaning::Evidence => Some(
                "This is evidence that the model detects what is injected: it claims so more often \
                 than under every control, and names the concept more often than chance. It rests \
                 on its judge: read the transcripts, and repeat it with another seed, before you \
                 believe it.",
            ),
        }
    }
}

impl fmt::Display for Headline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentences().join(" "))
    }
}

impl ReadHeadline {
    fn sentences(&self) -> Vec<String> {
        let Self { cell, held_out, all, random, words, .. } = self;
        let mut sentences = vec![format!(
            "Injected at depth {:.2} (layer {}) with a dose of {}, the concept can be read from \
             the next-token logits for {} of {} held-out words ({} of all {}; the cell was chosen \
             on the other words).",
            cell.depth, cell.layer, self.dose, held_out.k, held_out.n, all.k, all.n
        )];
        if random.n > 0 {
            let chance = random.n as f64 / (*words).max(1) as f64;
            sentences.push(format!(
                "Under random vectors of the same norm it is {} of {} ({chance:.1} \
                 expected by chance).",
                random.k, random.n
            ));
        }
        let (best, count) = self.best;
        if best != *cell {
            sentences.push(format!(
                "The grid's best is {} of {} at depth {:.2}, dose {} (chosen after looking, so too \
                 high).",
                count.k, count.n, best.depth, best.dose
            ));
        }
        sentences.extend(self.margin.map(|margin| {
            let interval = margin.interval.map_or(String::new(), |i| format!(" {}", decimals(i)));
            let (auroc, mass) = (margin.auroc, margin.mass);
            let weak = if mass < 0.05 {
                format!(", but yes and no together have only {} of the probability", percent(mass))
            } else {
                String::new()
            };
            format!(
                "There, the model's first-token margin of yes over no tells concept from random \
                 vectors with an AUROC of {auroc:.2}{interval} (0.5 is chance){weak}."
            )
        }));
        sentences
    }
}

impl ReplyHeadline {
    fn sentences(&self) -> Vec<String> {
        let Contrast { hits, random, clean, identified, .. } = &self.contrast;
        let mut mentions = format!(
            "{} of the sampled replies to {} under a concept's vector mention the concept",
            percent(self.mentions.share),
            self.prompt
        );
        if let Some(chance) = self.mentions_chance {
            mentions += &format!("; clean replies mention the same words in {}", percent(chance));
        }
        if let Some((cell, best)) = self.mentions_best {
            let (depth, dose) = (cell.depth, cell.dose);
            mentions += &format!(
                " (most at depth {depth:.2}, dose {dose}: {} of {}, chosen after looking)",
                best.count.k, best.count.n
            );
        }
        let mut claims =
            format!("The model claims to detect a thought in H = {} of them", rate(hits));
        let alarms = [("under random vectors", random), ("without injection", clean)];
        for (at, (name, alarm)) in
            alarms.iter().filter_map(|(name, r)| Some((name, r.as_ref()?))).enumerate()
        {
            claims += if at == 0 { ", and F = " } else { " and " };
            claims += &format!("{} {name}", rate(alarm));
        }
        let [concept, random, clean] = self.coherent.map(|r| r.map(|r| percent(r.share)));
        let parts = [("concept", concept), ("random", random), ("clean", clean)];
        let parts: Vec<_> = parts
            .into_iter()
            .filter_map(|(name, share)| Some(format!("{} {name}", share?)))
            .collect();
        let mut named = format!(
            "It answers coherently, claims first and then names it in I = {}",
            rate(identified)
        );
        if let Some(chance) = self.identified_chance {
            named += &format!(" (controls: {})", percent(chance));
        }
        let net = |name: &str, net: &Option<Difference>| {
            net.map(|net| format!("{name} = {} {}", signed(net.value), points(net.interval)))
        };
        let nets: Vec<_> = [
            net("H − F(random)", &self.contrast.net_random),
            net("H − F(clean)", &self.contrast.net_clean),
            net("I − F", &self.contrast.net_identified),
        ]
        .into_iter()
        .flatten()
        .collect();
        let mut all = vec![mentions + ".", claims + ".", named + "."];
        if !nets.is_empty() {
            all.push(format!("Net, in percentage points: {}.", nets.join(", ")));
        }
        all.push(format!("Coherent replies: {}.", parts.join(", ")));
        all
    }
}
