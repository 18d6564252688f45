//! The names that other programs have for points of a model.

use super::resolve::{Limits, check_layers};
use crate::{
    error::{Error, Result},
    model::ModelConfig,
    request::{CaptureSite, Site},
};

/// A point of a model: a site, and the block it is in where there is one in every block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// What is there.
    pub site: CaptureSite,
    /// Of which block, from 0.
    pub layer: Option<usize>,
    /// Which of its heads of attention, from 0, where the name says one.
    pub head: Option<usize>,
}

impl std::fmt::Display for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.site.name())?;
        [self.layer, self.head].into_iter().flatten().try_for_each(|index| write!(f, ".{index}"))
    }
}

impl Point {
    /// The site to inject at.
    ///
    /// # Errors
    /// It can only be captured.
    pub fn injected(self) -> Result<(Site, usize)> {
        let site = match self.site {
            CaptureSite::ResidPre => Site::ResidPre,
            CaptureSite::ResidMid => Site::ResidMid,
            CaptureSite::ResidPost => Site::ResidPost,
            CaptureSite::AttnOut => Site::AttnOut,
            CaptureSite::MlpOut => Site::MlpOut,
            CaptureSite::HeadOut => Site::HeadOut,
            CaptureSite::Q
            | CaptureSite::K
            | CaptureSite::V
            | CaptureSite::FinalNorm
            | CaptureSite::Logits => {
                return Err(Error::new("this point can be captured, not injected at").got(self));
            }
        };
        Ok((site, self.layer.unwrap_or_default()))
    }
}

/// The point that a name stands for in a model, as in a request's `hook`.
///
/// # Errors
/// As a request that names it.
pub fn point(name: &str, config: &ModelConfig) -> Result<Point> {
    parse(name, config.into())
}

/// What a name of this program (`resid_post.20`), of `TransformerLens` (`blocks.20.hook_resid_post`), of
/// interp-engine (`mlp_out_post.20`) or a module path of Hugging Face transformers (`model.layers.20`: the module's output; with `.input` what
/// goes into it; `hidden_states[20]`) stands for.
///
/// # Errors
/// It is none of them, there is no such block, or in this model the point is another one.
pub(super) fn parse(name: &str, limits: Limits) -> Result<Point> {
    let unknown = || {
        Error::new("no known name of a point")
            .at("hook")
            .expected(
                "resid_post.20, blocks.20.hook_resid_post, model.layers.20 and the like \
                 (docs/requests.md)",
            )
            .got(format!("{name:?}"))
    };
    let (point, is_module) = own(name)
        .or_else(|| transformer_lens(name))
        .or_else(|| interp_engine(name))
        .map(|point| (point, false))
        .or_else(|| hugging_face(name, limits.layers).map(|point| (point, true)))
        .ok_or_else(unknown)?;
    if let Some(layer) = point.layer {
        check_layers(&[layer], limits, "hook")?;
    }
    if let Some(head) = point.head.filter(|&head| head >= limits.heads) {
        return Err(Error::new("head out of range")
            .at("hook")
            .expected(format!("0..={} (a block has {} heads)", limits.heads - 1, limits.heads))
            .got(head));
    }
    let is_branch = matches!(point.site, CaptureSite::AttnOut | CaptureSite::MlpOut);
    if is_module && is_branch && limits.changes_branches {
        return Err(Error::new(
            "this model normalises or scales what the module gives before it adds it",
        )
        .at("hook")
        .expected(format!("{point}, what is added"))
        .got(format!("{name:?}, what the module gives")));
    }
    Ok(point)
}

const IN_BLOCKS: [CaptureSite; 9] = [
    CaptureSite::ResidPre,
    CaptureSite::ResidMid,
    CaptureSite::ResidPost,
    CaptureSite::AttnOut,
    CaptureSite::MlpOut,
    CaptureSite::HeadOut,
    CaptureSite::Q,
    CaptureSite::K,
    CaptureSite::V,
];

fn own(name: &str) -> Option<Point> {
    let at = |site: CaptureSite, layer, head| Some(Point { site, layer, head });
    let Some((site, place)) = name.split_once('.') else {
        let ends = [CaptureSite::FinalNorm, CaptureSite::Logits];
        let end = ends.into_iter().find(|site| site.name() == name);
        return end.and_then(|site| at(site, None, None));
    };
    let site = IN_BLOCKS.into_iter().find(|known| known.name() == site)?;
    match place.split_once('.') {
        Some((layer, head)) if site == CaptureSite::HeadOut => {
            at(site, Some(layer.parse().ok()?), Some(head.parse().ok()?))
        }
        Some(_) => None,
        None => at(site, Some(place.parse().ok()?), None),
    }
}

fn transformer_lens(name: &str) -> Option<Point> {
    let (layer, hook) = name.strip_prefix("blocks.")?.split_once('.')?;
    match hook.strip_prefix("attn.hook_") {
        Some("z") => own(&format!("head_out.{layer}")),
        Some("rot_q") => own(&format!("q.{layer}")),
        Some("rot_k") => own(&format!("k.{layer}")),
        Some("v") => own(&format!("v.{layer}")),
        // Before rope: not known.
        Some(_) => None,
        None => {
            let site = hook.strip_prefix("hook_")?;
            let in_stream = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"];
            in_stream.contains(&site).then(|| own(&format!("{site}.{layer}")))?
        }
    }
}

/// Where it has the same name for the same point, `own` has been asked; its `attn_out` and `mlp_out` are
/// what the module gives, which in some families is not yet what is added.
fn interp_engine(name: &str) -> Option<Point> {
    if name == "lm_head" {
        return own("logits");
    }
    let (point, layer) = name.split_once('.')?;
    let site = match point {
        "attn_out_post" => "attn_out",
        "mlp_out_post" => "mlp_out",
        "z" => "head_out",
        "value" => "v",
        _ => return None,
    };
    own(&format!("{site}.{layer}"))
}

fn hugging_face(name: &str, layers: usize) -> Option<Point> {
    let in_block = |site, layer| Some(Point { site, layer: Some(layer), head: None });
    let end = |site| Some(Point { site, layer: None, head: None });
    if let Some(index) = name.strip_prefix("hidden_states[").and_then(|n| n.strip_suffix(']')) {
        let index: usize = index.parse().ok()?;
        return match index {
            index if index == layers => end(CaptureSite::FinalNorm),
            index => in_block(CaptureSite::ResidPre, index),
        };
    }
    let name = name.strip_suffix("[0]").unwrap_or(name);
    let (module, is_input) = match name.strip_suffix(".input") {
        Some(module) => (module, true),
        None => (name.strip_suffix(".output").unwrap_or(name), false),
    };
    match (module, is_input) {
        ("model.norm", false) => return end(CaptureSite::FinalNorm),
        ("lm_head", false) => return end(CaptureSite::Logits),
        _ => {}
    }
    let rest = module.strip_prefix("model.layers.")?;
    let (layer, part) = rest.split_once('.').map_or((rest, None), |(l, part)| (l, Some(part)));
    let site = match (part, is_input) {
        (None, true) => CaptureSite::ResidPre,
        (None, false) => CaptureSite::ResidPost,
        (Some("self_attn"), false) => CaptureSite::AttnOut,
        (Some("mlp" | "block_sparse_moe"), false) => CaptureSite::MlpOut,
        (Some("self_attn.o_proj"), true) => CaptureSite::HeadOut,
        (Some("self_attn.v_proj"), false) => CaptureSite::V,
        _ => return None,
    };
    in_block(site, layer.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Norms, Shape};

    #[test]
    fn names_of_other_programs_are_known() {
        let shape =
            Shape { layers: 2, dim: 8, heads: 2, kv_heads: 1, head_dim: 8, ffn_dim: 8, vocab: 9 };
        let config = ModelConfig::llama(shape, 16, 1e4);
        let of = |name: &str| parse(name, (&config).into()).map(|point| point.to_string());
        let last = config.layers;
        let known = [
            ("resid_mid.1", "resid_mid.1"),
            ("logits", "logits"),
            ("blocks.1.hook_resid_pre", "resid_pre.1"),
            ("blocks.0.hook_mlp_out", "mlp_out.0"),
            ("model.layers.1", "resid_post.1"),
            ("model.layers.1.output[0]", "resid_post.1"),
            ("model.layers.1.input", "resid_pre.1"),
            ("model.layers.0.self_attn", "attn_out.0"),
            ("model.layers.0.mlp.output", "mlp_out.0"),
            ("model.norm", "final_norm"),
            ("lm_head", "logits"),
            ("hidden_states[1]", "resid_pre.1"),
            ("head_out.1", "head_out.1"),
            ("head_out.1.0", "head_out.1.0"),
            ("blocks.1.attn.hook_z", "head_out.1"),
            ("blocks.0.attn.hook_rot_q", "q.0"),
            ("blocks.0.attn.hook_v", "v.0"),
            ("model.layers.1.self_attn.o_proj.input", "head_out.1"),
            ("model.layers.1.self_attn.v_proj", "v.1"),
            ("attn_out_post.1", "attn_out.1"),
            ("mlp_out_post.0", "mlp_out.0"),
            ("z.1", "head_out.1"),
            ("value.0", "v.0"),
        ];
        for (name, want) in known {
            assert_eq!(of(name).unwrap(), want, "{name}");
        }
        assert_eq!(of(&format!("hidden_states[{last}]")).unwrap(), "final_norm");
        let bad = [
            "resid_post",
            "resid_post.x",
            "blocks.1.hook_resid",
            "blocks.1.attn.hook_q",
            "blocks.1.attn.hook_pattern",
            "blocks.1.hook_q",
            "resid_post.1.0",
            "attn_probs.1",
            "model.layers.1.self_attn.q_proj",
            "ln_final.hook_normalized",
            "model.layers.1.self_attn.input",
            "model.embed_tokens",
            "hidden_states[-1]",
            "",
        ];
        for name in bad {
            assert!(of(name).unwrap_err().to_string().contains("no known name"), "{name}");
        }
        let beyond = of("head_out.1.2").unwrap_err().to_string();
        assert!(beyond.contains("a block has 2 heads"), "{beyond}");
        let beyond = of(&format!("model.layers.{last}")).unwrap_err().to_string();
        assert!(beyond.contains("out of range"), "{beyond}");
        // Where a branch is normalised, a module's output is not what is added.
        let around = ModelConfig { norms: Norms::Around, ..config };
        let of = |name: &str| parse(name, (&around).into()).map(|point| point.to_string());
        assert!(of("model.layers.0.mlp").unwrap_err().to_string().contains("mlp_out.0"));
        assert_eq!(of("blocks.0.hook_mlp_out").unwrap(), "mlp_out.0");
    }
}
