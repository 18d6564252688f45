//! Seeds, trial ids and content hashes: SHA-256 over canonical JSON (fields in the order of the
//! type, no spaces, shortest round-trip numbers).

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::files::hex;

use crate::{
    experiment::results::Condition,
    request::{Op, Sampling, Site, StrengthMode},
};

/// Version of what trial ids hash; raised when the meaning of a trial changes.
pub const SCHEMA: u32 = 1;

/// The seed of a trial's sampling. It knows nothing of condition, layer and dose, so that all of
/// them share one clean partner.
pub fn seed(run_seed: u64, prompt: &str, concept: &str, repeat: u32) -> u64 {
    first_u64(&digest(&("seed", run_seed, prompt, concept, repeat)))
}

/// The key of the numbers that a control vector is made of; `control` names its kind.
pub fn vector_key(control: &str, run_seed: u64, concept: &str, layer: usize, draw: u32) -> u64 {
    first_u64(&digest(&(control, run_seed, concept, layer, draw)))
}

/// Hash of a vector's content: 32 hex digits.
pub fn vector_hash(vector: &[f32]) -> String {
    let mut hasher = Sha256::new();
    for value in vector {
        hasher.update(value.to_le_bytes());
    }
    hex(&hasher.finalize()[..16])
}

/// All that a trial's result depends on but the numerics, which belong to the run.
#[derive(Debug, Serialize)]
pub struct Identity<'a> {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The model's hash.
    pub model: &'a str,
    /// The part's name.
    pub part: &'a str,
    /// The prompt's name.
    pub prompt: &'a str,
    /// The word; "" where none has part.
    pub concept: &'a str,
    /// What is injected.
    pub condition: Condition,
    /// 0-based.
    pub repeat: u32,
    /// The rendered prompt.
    pub tokens: &'a [u32],
    /// What is injected; none for a clean trial.
    pub inject: Option<InjectionIdentity<'a>>,
    /// How the reply is drawn, the seed included.
    pub sampling: Sampling,
    /// Tokens whose logits are read.
    pub watch: &'a [u32],
}

/// An injection in an [`Identity`].
#[derive(Debug, Serialize)]
pub struct InjectionIdentity<'a> {
    /// [`vector_hash`].
    pub vector: &'a str,
    /// Point of the block.
    pub site: Site,
    /// Block, from 0.
    pub layer: usize,
    /// What is done.
    pub op: Op,
    /// Strength in units of `mode`.
    pub dose: f64,
    /// Its unit.
    pub mode: StrengthMode,
    /// First position of the window.
    pub from: usize,
    /// Its end; `None`: through every generated token.
    pub to: Option<usize>,
}

/// The trial's id: 32 hex digits.
pub fn trial_id(identity: &Identity) -> String {
    hex(&digest(identity)[..16])
}

/// 64 hex digits over the canonical JSON of any plain value.
pub fn content_hash(value: &impl Serialize) -> String {
    hex(&digest(value))
}

fn digest(value: &impl Serialize) -> [u8; 32] {
    let json = serde_json::to_vec(value).expect("plain data with string keys has a JSON form");
    Sha256::digest(json).into()
}

fn first_u64(digest: &[u8; 32]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *digest;
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity<'a>(inject: Option<InjectionIdentity<'a>>, tokens: &'a [u32]) -> Identity<'a> {
        Identity {
            schema: SCHEMA,
            model: "m",
            part: "sampled",
            prompt: "cued",
            concept: "Bread",
            condition: Condition::Concept,
            repeat: 0,
            tokens,
            inject,
            sampling: Sampling { seed: 7, max_tokens: 60, ..Sampling::default() },
            watch: &[1, 2],
        }
    }

    fn injection(vector: &str, layer: usize, dose: f64) -> InjectionIdentity<'_> {
        InjectionIdentity {
            vector,
            site: Site::ResidPost,
            layer,
            op: Op::Add,
            dose,
            mode: StrengthMode::Reference,
            from: 3,
            to: None,
        }
    }

    #[test]
    fn seeds_are_pinned() {
        // sha256 of ["seed",1,"cued","Bread",0]
        assert_eq!(seed(1, "cued", "Bread", 0), 0xbfb4_bd5f_b72e_dca2);
        let others = [
            seed(2, "cued", "Bread", 0),
            seed(1, "open", "Bread", 0),
            seed(1, "cued", "Milk", 0),
            seed(1, "cued", "Bread", 1),
        ];
        assert!(others.iter().all(|other| *other != seed(1, "cued", "Bread", 0)));
    }

    #[test]
    fn control_vectors_have_keys_of_their_own() {
        let key = vector_key("random", 1, "Bread", 24, 0);
        let others = [
            vector_key("shuffled", 1, "Bread", 24, 0),
            vector_key("random", 2, "Bread", 24, 0),
            vector_key("random", 1, "Milk", 24, 0),
            vector_key("random", 1, "Bread", 25, 0),
            vector_key("random", 1, "Bread", 24, 1),
        ];
        assert!(!others.contains(&key));
    }

    #[test]
    fn ids_are_pinned_and_depend_on_everything() {
        let id = |identity: Identity| trial_id(&identity);
        let base = id(identity(Some(injection("v", 24, 0.5)), &[5, 6]));
        assert_eq!(base, "97b7148e936ad7bb144991e565ab1994");
        let others = [
            id(identity(None, &[5, 6])),
            id(identity(Some(injection("w", 24, 0.5)), &[5, 6])),
            id(identity(Some(injection("v", 23, 0.5)), &[5, 6])),
            id(identity(Some(injection("v", 24, 0.25)), &[5, 6])),
            id(identity(Some(injection("v", 24, 0.5)), &[5, 7])),
            id(identity(Some(InjectionIdentity { from: 4, ..injection("v", 24, 0.5) }), &[5, 6])),
            id(Identity { part: "ramp", ..identity(Some(injection("v", 24, 0.5)), &[5, 6]) }),
            id(Identity { model: "n", ..identity(Some(injection("v", 24, 0.5)), &[5, 6]) }),
            id(Identity { repeat: 1, ..identity(Some(injection("v", 24, 0.5)), &[5, 6]) }),
        ];
        assert!(others.iter().all(|other| *other != base && other.len() == 32));
    }

    #[test]
    fn vector_hash_sees_every_bit() {
        assert_eq!(vector_hash(&[1.0, 2.0]), vector_hash(&[1.0, 2.0]));
        assert_ne!(vector_hash(&[1.0, 2.0]), vector_hash(&[1.0, f32::from_bits(0x4000_0001)]));
        assert_ne!(vector_hash(&[0.0]), vector_hash(&[-0.0]));
    }
}
