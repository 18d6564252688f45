//! The angles of a `config.json`, old and new spellings.

use serde_json::Value;

use super::{
    super::{
        DEFAULT_THETA, Rope, checked_theta, missing, refused,
        rope::{Scaling, Yarn},
    },
    Json, short,
};
use crate::error::{Context, Error, Result};

impl Json<'_> {
    /// Components of a head that are turned.
    pub(super) fn rotary_dim(&self, head_dim: usize) -> Result<usize> {
        let key = "partial_rotary_factor";
        let inner = ["rope_parameters", "rope_scaling"].into_iter();
        let mut inner = inner.filter_map(|parameters| self.get(parameters)?.get(key));
        let part = match inner.find(|value| !value.is_null()) {
            Some(value) => value.as_f64().ok_or_else(|| refused(key, "a number", short(value)))?,
            None => self.float(key)?.unwrap_or(1.0),
        };
        if (0.0..=1.0).contains(&part) {
            return Ok((head_dim as f64 * part) as usize);
        }
        Err(refused(key, "a number from 0 to 1", part))
    }

    /// The angles of blocks without and with a window, and the most positions that they are for.
    pub(super) fn ropes(&self, width: usize) -> Result<([Rope; 2], Option<usize>)> {
        let parameters = self.get("rope_parameters");
        if let Some(scaling) = self.get("rope_scaling").filter(|_| parameters.is_some()) {
            return Err(refused("rope_scaling", "nothing beside rope_parameters", short(scaling)));
        }
        let is_nested = ["full_attention", "sliding_attention"]
            .iter()
            .any(|kind| parameters.is_some_and(|value| value.get(kind).is_some()));
        let theta = self.float("rope_theta")?.unwrap_or(DEFAULT_THETA);
        let nested = |kind: &str| parameters.and_then(|value| value.get(kind));
        let place = |kind: &str| format!("rope_parameters.{kind}");
        if is_nested {
            let part = "partial_rotary_factor";
            let kinds = ["full_attention", "sliding_attention"].into_iter();
            if let Some(value) = kinds
                .filter_map(|kind| nested(kind)?.get(part))
                .find(|value| !value.is_null() && value.as_f64() != Some(1.0))
            {
                return Err(refused(part, "1 for each kind of block", short(value)));
            }
            let local = self.float("rope_local_base_freq")?.unwrap_or(theta);
            let (full, most) =
                self.rope(nested("full_attention"), theta, width).at(|| place("full_attention"))?;
            let (local, _) = self
                .rope(nested("sliding_attention"), local, width)
                .at(|| place("sliding_attention"))?;
            return Ok(([full, local], most));
        }
        let key = if parameters.is_some() { "rope_parameters" } else { "rope_scaling" };
        let value = self.get(key);
        let inner = value.and_then(|value| value.get("rope_theta")).and_then(Value::as_f64);
        let outer = self.fields.get("rope_theta").and_then(Value::as_f64);
        if let (Some(inner), Some(outer)) = (inner, outer)
            && inner != outer
        {
            return Err(refused("rope_theta", format!("{inner}, as in {key}"), outer));
        }
        let (full, most) = self.rope(value, theta, width).at(|| key.to_owned())?;
        // Windowed blocks of these are never scaled.
        let local = match self.family.name {
            "gemma3_text" => self.needed_float("rope_local_base_freq")?,
            "olmo3" => inner.unwrap_or(theta),
            _ => return Ok(([full.clone(), full], most)),
        };
        Ok(([full, Rope::plain(width, checked_theta(local)?)], most))
    }

    /// One set of angles from its parameters.
    fn rope(
        &self,
        value: Option<&Value>,
        theta: f64,
        width: usize,
    ) -> Result<(Rope, Option<usize>)> {
        let Some(value) = value.filter(|value| !value.is_null()) else {
            return Ok((Rope::plain(width, checked_theta(theta)?), None));
        };
        let fields = value.as_object().ok_or_else(|| {
            Error::new("unsupported model configuration").expected("an object").got(short(value))
        })?;
        let inner = Json { family: self.family, fields, defaults: Value::Null };
        let theta = checked_theta(inner.float("rope_theta")?.unwrap_or(theta))?;
        let kind = match inner.text("rope_type")? {
            Some(kind) => kind,
            None => inner.text("type")?.unwrap_or("default"),
        };
        let kind = if self.family.name == "phi3" && ["su", "yarn"].contains(&kind) {
            "longrope"
        } else {
            kind
        };
        inner.only_known(kind)?;
        let original = || match self.size("original_max_position_embeddings")? {
            Some(original) => Ok(original),
            None => match inner.size("original_max_position_embeddings")? {
                Some(original) => Ok(original),
                None => self.needed("max_position_embeddings"),
            },
        };
        let mut most = None;
        let scaling = match kind {
            // Up to the positions that the model was made for, dynamic scaling does nothing; more are
            // not computed.
            "default" | "dynamic" => None,
            "linear" => Some(Scaling::Linear(inner.needed_float("factor")?)),
            "llama3" => Some(Scaling::Llama3 {
                factor: inner.needed_float("factor")?,
                low: inner.needed_float("low_freq_factor")?,
                high: inner.needed_float("high_freq_factor")?,
                original: original()? as f64,
            }),
            "yarn" => Some(Scaling::Yarn(self.yarn(&inner, original()?)?)),
            // Sequences that may become longer have other frequencies from their first position on.
            "longrope" => {
                most = Some(original()?);
                Some(self.longrope(&inner, original()?, width)?)
            }
            other => {
                let known = "default, linear, dynamic, yarn, longrope or llama3";
                return Err(refused("rope_type", known, other));
            }
        };
        Ok((Rope::scaled(width, theta, scaling.as_ref()), most))
    }

    /// Refuses parameters of a kind of rope that are not known.
    fn only_known(&self, kind: &str) -> Result<()> {
        const EVERYWHERE: [&str; 4] = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
        let known: &[&str] = match kind {
            "linear" | "dynamic" => &["factor", "original_max_position_embeddings"],
            "llama3" => &[
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ],
            "yarn" => &[
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            ],
            "longrope" => &[
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "short_factor",
                "long_factor",
            ],
            _ => &[],
        };
        for (key, value) in self.fields {
            if !value.is_null() && !EVERYWHERE.contains(&&**key) && !known.contains(&&**key) {
                let expected = format!("parameters of rope_type {kind}");
                return Err(refused(key, expected, short(value)));
            }
        }
        Ok(())
    }

    fn yarn(&self, inner: &Json<'_>, original: usize) -> Result<Yarn> {
        let factor = self.factor(inner, original)?;
        let magnitudes = (inner.float("mscale")?, inner.float("mscale_all_dim")?);
        let scale = match (inner.float("attention_factor")?, magnitudes) {
            (Some(scale), _) => scale,
            (None, (Some(one), Some(all))) if one != 0.0 && all != 0.0 => {
                Yarn::magnitude(factor, one) / Yarn::magnitude(factor, all)
            }
            _ => Yarn::magnitude(factor, 1.0),
        };
        let turns = |key, default| {
            Ok::<_, Error>(inner.float(key)?.filter(|turns| *turns != 0.0).unwrap_or(default))
        };
        let truncate = inner.typed("truncate", "true or false", Value::as_bool)?.unwrap_or(true);
        Ok(Yarn {
            factor,
            original: original as f64,
            beta_fast: turns("beta_fast", 32.0)?,
            beta_slow: turns("beta_slow", 1.0)?,
            truncate,
            scale,
        })
    }

    /// By how much more positions than `original` there can be.
    fn factor(&self, inner: &Json<'_>, original: usize) -> Result<f64> {
        match inner.float("factor")? {
            Some(factor) => Ok(factor),
            None => match self.needed("max_position_embeddings")? {
                most if most == original => Err(missing("factor")),
                most => Ok(most as f64 / original as f64),
            },
        }
    }

    fn longrope(&self, inner: &Json<'_>, original: usize, width: usize) -> Result<Scaling> {
        let factors = |key: &str| {
            let expected = format!("{} numbers, one a pair", width / 2);
            let list = inner.list(key, &expected, Value::as_f64)?.ok_or_else(|| missing(key))?;
            if list.len() != width / 2 {
                return Err(refused(key, expected, list.len()));
            }
            Ok(list)
        };
        factors("long_factor")?;
        let factor = self.factor(inner, original)?;
        let usual = longrope_scale(factor, original as f64);
        let factors = factors("short_factor")?.into_iter().map(|factor| factor as f32).collect();
        Ok(Scaling::Each { factors, scale: inner.float("attention_factor")?.unwrap_or(usual) })
    }
}

/// Of the cosines and sines (Ding et al. 2024, section 3.2).
fn longrope_scale(factor: f64, original: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() }
}
