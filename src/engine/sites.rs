//! Where in a model something is seen or changed: sites, their taps, and how wide a row is there.

use super::types::{Capture, Injection};
use crate::{
    model::ModelConfig,
    ops::hooks::{HeadTap, head_tap, heads_of_tap},
    request::{CaptureSite, Site},
};

/// The number of a site along the stream, see `ops::hooks::site_count`; of what is added to it, the
/// site that it is added at.
pub fn site_index(site: Site, layer: usize) -> usize {
    match site {
        Site::ResidPre => 2 * layer,
        Site::ResidMid | Site::AttnOut | Site::HeadOut => 2 * layer + 1,
        Site::ResidPost | Site::MlpOut => 2 * layer + 2,
    }
}

/// The tap that an injection acts on, see `ops::hooks::tap_count`.
pub fn tap(site: Site, layer: usize, layers: usize) -> usize {
    match site {
        Site::HeadOut => head_tap(layers, layer, HeadTap::Output),
        _ => 2 * site_index(site, layer) + usize::from(!site.is_stream()),
    }
}

/// The first layer that computes what is behind a site: the block itself for what is added in it.
pub fn cut(site: Site, layer: usize) -> usize {
    if site.is_stream() { site_index(site, layer) / 2 } else { layer }
}

/// Whether a tap's row is the same with and without what differs in layer `cut` and above.
pub fn is_below(tap: usize, cut: usize, layers: usize) -> bool {
    if let Some((layer, _)) = heads_of_tap(layers, tap) {
        return layer < cut;
    }
    let (site, is_branch) = (tap / 2, tap % 2 == 1);
    // The branch into the first site of the cut was added below it.
    site < 2 * cut || site == 2 * cut && is_branch
}

/// `resid_post.20`, `head_out.20.3` and the like.
pub fn site_name(injection: &Injection) -> String {
    let name = layer_name(injection.site, injection.layer);
    injection.head.map_or_else(|| name.clone(), |head| format!("{name}.{head}"))
}

/// `resid_post.20` and the like.
pub fn layer_name(site: Site, layer: usize) -> String {
    format!("{}.{layer}", CaptureSite::from(site).name())
}

/// The tap of a capture; `None` for logits.
pub fn tap_index(capture: &Capture, layers: usize) -> Option<usize> {
    let layer = capture.layer.unwrap_or(0);
    let heads = |of| head_tap(layers, layer, of);
    Some(match capture.site {
        CaptureSite::ResidPre => tap(Site::ResidPre, layer, layers),
        CaptureSite::ResidMid => tap(Site::ResidMid, layer, layers),
        CaptureSite::ResidPost => tap(Site::ResidPost, layer, layers),
        CaptureSite::AttnOut => tap(Site::AttnOut, layer, layers),
        CaptureSite::MlpOut => tap(Site::MlpOut, layer, layers),
        CaptureSite::HeadOut => heads(HeadTap::Output),
        CaptureSite::Q => heads(HeadTap::Query),
        CaptureSite::K => heads(HeadTap::Key),
        CaptureSite::V => heads(HeadTap::Value),
        CaptureSite::FinalNorm => 2 * (2 * layers) + 2,
        CaptureSite::Logits => return None,
    })
}

/// Numbers of a row that is captured at a site: (heads, `head_dim`), (dim,) or (vocabulary,).
pub fn row_shape(site: CaptureSite, config: &ModelConfig) -> Vec<usize> {
    match site {
        CaptureSite::Logits => vec![config.vocab],
        CaptureSite::HeadOut | CaptureSite::Q => vec![config.heads, config.head_dim],
        CaptureSite::K | CaptureSite::V => vec![config.kv_heads, config.head_dim],
        _ => vec![config.dim],
    }
}

/// Likewise, by its tap, in all.
pub fn tap_width(tap: usize, config: &ModelConfig) -> usize {
    match heads_of_tap(config.layers, tap) {
        Some((_, HeadTap::Query | HeadTap::Output)) => config.heads * config.head_dim,
        Some((_, HeadTap::Key | HeadTap::Value)) => config.kv_heads * config.head_dim,
        None => config.dim,
    }
}

/// Numbers of what an injection at a site acts on.
pub fn injected_width(site: Site, config: &ModelConfig) -> usize {
    if site == Site::HeadOut { config.head_dim } else { config.dim }
}
