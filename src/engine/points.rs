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
}

impl std::fmt::Display for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.site.name())?;
        self.layer.map_or(Ok(()), |layer| write!(f, ".{layer}"))
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
            CaptureSite::FinalNorm | CaptureSite::Logits => {
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

/// What a name of this program (`resid_post.20`), of `TransformerLens` (`blocks.20.hook_resid_post`) or a
/// module path of Hugging Face transformers (`model.layers.20`: the module's output; with `.input` what
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
        .map(|point| (point, false))
        .or_else(|| hugging_face(name, limits.layers).map(|point| (point, true)))
        .ok_or_else(unknown)?;
    if let Some(layer) = point.layer {
        check_layers(&[layer], limits, "hook")?;
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

const IN_BLOCKS: [CaptureSite; 5] = [
    CaptureSite::ResidPre,
    CaptureSite::ResidMid,
    CaptureSite::ResidPost,
    CaptureSite::AttnOut,
    CaptureSite::MlpOut,
];

fn own(name: &str) -> Option<Point> {
    let at = |site: CaptureSite, layer| Some(Point { site, layer });
    let Some((site, layer)) = name.rsplit_once('.') else {
        let ends = [CaptureSite::FinalNorm, CaptureSite::Logits];
        return ends.into_iter().find(|site| site.name() == name).and_then(|site| at(site, None));
    };
    let site = IN_BLOCKS.into_iter().find(|known| known.name() == site)?;
    at(site, Some(layer.parse().ok()?))
}

fn transformer_lens(name: &str) -> Option<Point> {
    let (layer, hook) = name.strip_prefix("blocks.")?.split_once(".hook_")?;
    own(&format!("{hook}.{layer}"))
}

fn hugging_face(name: &str, layers: usize) -> Option<Point> {
    let in_block = |site, layer| Some(Point { site, layer: Some(layer) });
    if let Some(index) = name.strip_prefix("hidden_states[").and_then(|n| n.strip_suffix(']')) {
        let index: usize = index.parse().ok()?;
        return match index {
            index if index == layers => Some(Point { site: CaptureSite::FinalNorm, layer: None }),
            index => in_block(CaptureSite::ResidPre, index),
        };
    }
    let name = name.strip_suffix("[0]").unwrap_or(name);
    let (module, is_input) = match name.strip_suffix(".input") {
        Some(module) => (module, true),
        None => (name.strip_suffix(".output").unwrap_or(name), false),
    };
    match (module, is_input) {
        ("model.norm", false) => return Some(Point { site: CaptureSite::FinalNorm, layer: None }),
        ("lm_head", false) => return Some(Point { site: CaptureSite::Logits, layer: None }),
        _ => {}
    }
    let rest = module.strip_prefix("model.layers.")?;
    let (layer, part) = rest.split_once('.').map_or((rest, None), |(l, part)| (l, Some(part)));
    let site = match (part, is_input) {
        (None, true) => CaptureSite::ResidPre,
        (None, false) => CaptureSite::ResidPost,
        (Some("self_attn"), false) => CaptureSite::AttnOut,
        (Some("mlp" | "block_sparse_moe"), false) => CaptureSite::MlpOut,
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
            Shape { layers: 2, dim: 8, heads: 1, kv_heads: 1, head_dim: 8, ffn_dim: 8, vocab: 9 };
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
        ];
        for (name, want) in known {
            assert_eq!(of(name).unwrap(), want, "{name}");
        }
        assert_eq!(of(&format!("hidden_states[{last}]")).unwrap(), "final_norm");
        let bad = [
            "resid_post",
            "resid_post.x",
            "blocks.1.hook_resid",
            "blocks.1.attn.hook_z",
            "ln_final.hook_normalized",
            "model.layers.1.self_attn.input",
            "model.embed_tokens",
            "hidden_states[-1]",
            "",
        ];
        for name in bad {
            assert!(of(name).unwrap_err().to_string().contains("no known name"), "{name}");
        }
        let beyond = of(&format!("model.layers.{last}")).unwrap_err().to_string();
        assert!(beyond.contains("out of range"), "{beyond}");
        // Where a branch is normalised, a module's output is not what is added.
        let around = ModelConfig { norms: Norms::Around, ..config };
        let of = |name: &str| parse(name, (&around).into()).map(|point| point.to_string());
        assert!(of("model.layers.0.mlp").unwrap_err().to_string().contains("mlp_out.0"));
        assert_eq!(of("blocks.0.hook_mlp_out").unwrap(), "mlp_out.0");
    }
}
