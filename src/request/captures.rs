//! What is copied out, and what is made of it.

use serde::{Deserialize, Serialize};

use super::{All, Site, VectorRef};

/// Rows of a site to be copied out.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Capture {
    /// What is copied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<CaptureSite>,
    /// Instead of `site` and `layers`: the point by a name of this or another program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hook: Option<String>,
    /// Of which blocks; sites without a layer take none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// Of which prompt positions.
    #[serde(default)]
    pub positions: Positions,
    /// What is handed out of the rows; absent: the rows themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reduce: Option<Reduction>,
}

impl Capture {
    /// All prompt positions of a site, in every block where there is one in each.
    pub fn all(site: CaptureSite) -> Self {
        Self {
            site: Some(site),
            hook: None,
            layers: site.has_layer().then_some(Layers::All(All::All)),
            positions: Positions::default(),
            reduce: None,
        }
    }
}

/// What is made of captured rows.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reduction {
    /// Their mean, one row.
    Mean,
    /// ‖h‖ of each row.
    Norm,
    /// h·v / (‖h‖ ‖v‖) of each row with each vector.
    Cosine(Probes),
    /// h·v / ‖v‖ of each row with each vector.
    Coordinate(Probes),
    /// The logit lens: so many likeliest tokens of each row, taken for the stream after the last block, with
    /// their log-probabilities.
    Lens(usize),
}

/// Vectors that rows are compared with.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum Probes {
    /// `FILE#NAME`, or all vectors of `FILE`.
    One(String),
    /// Several.
    Many(Vec<VectorRef>),
}

/// What can be copied out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CaptureSite {
    /// The block's input, after the injections there.
    ResidPre,
    /// After attention is added, and the injections there.
    ResidMid,
    /// The block's output, after the injections there.
    ResidPost,
    /// What attention adds to the stream.
    AttnOut,
    /// What the MLP adds to the stream.
    MlpOut,
    /// What the heads of attention give to the output projection, after the injections there.
    HeadOut,
    /// Queries after rope.
    Q,
    /// Keys after rope.
    K,
    /// Values.
    V,
    /// The last norm's output.
    FinalNorm,
    /// The next-token logits.
    Logits,
}

impl From<Site> for CaptureSite {
    fn from(site: Site) -> Self {
        match site {
            Site::ResidPre => Self::ResidPre,
            Site::ResidMid => Self::ResidMid,
            Site::ResidPost => Self::ResidPost,
            Site::AttnOut => Self::AttnOut,
            Site::MlpOut => Self::MlpOut,
            Site::HeadOut => Self::HeadOut,
        }
    }
}

impl CaptureSite {
    /// Whether there is one in every block.
    pub fn has_layer(self) -> bool {
        !matches!(self, Self::FinalNorm | Self::Logits)
    }

    /// The name used in requests and tensor names.
    pub fn name(self) -> &'static str {
        match self {
            Self::ResidPre => "resid_pre",
            Self::ResidMid => "resid_mid",
            Self::ResidPost => "resid_post",
            Self::AttnOut => "attn_out",
            Self::MlpOut => "mlp_out",
            Self::HeadOut => "head_out",
            Self::Q => "q",
            Self::K => "k",
            Self::V => "v",
            Self::FinalNorm => "final_norm",
            Self::Logits => "logits",
        }
    }
}

/// A list of blocks or all of them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum Layers {
    /// These.
    List(Vec<usize>),
    /// `"all"`.
    All(All),
}

/// Prompt positions.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum Positions {
    /// These; negative: from the prompt's end.
    List(Vec<i64>),
    /// `"all"` or `"last"`.
    Named(NamedPositions),
}

impl Default for Positions {
    fn default() -> Self {
        Self::Named(NamedPositions::All)
    }
}

/// Sets of positions with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum NamedPositions {
    /// Every prompt position.
    All,
    /// The prompt's last one.
    Last,
}
