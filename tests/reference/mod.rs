//! The f64 reference: a Llama transformer as plain loops, with injections and captures. It shares
//! no code with the crate and is itself checked against Hugging Face transformers.

pub mod load;
pub mod ops;
pub mod sampling;

use std::collections::BTreeMap;

use ops::{Change, Matrix, Mode, add, attention, gated, matmul, norm, rms_norm, rope, silu};

/// Rows of a site, one a position.
pub type Rows = Vec<Vec<f64>>;

/// Sizes and constants of the model.
#[derive(Clone, Debug)]
pub struct Config {
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub eps: f64,
    pub theta: f32,
}

/// One block's weights; matrices are (out, in).
pub struct Block {
    pub attn_norm: Vec<f64>,
    pub q: Matrix,
    pub k: Matrix,
    pub v: Matrix,
    pub o: Matrix,
    pub mlp_norm: Vec<f64>,
    pub gate: Matrix,
    pub up: Matrix,
    pub down: Matrix,
}

/// The model.
pub struct Transformer {
    pub config: Config,
    /// (vocab, dim).
    pub embed: Matrix,
    pub blocks: Vec<Block>,
    pub final_norm: Vec<f64>,
    /// (vocab, dim).
    pub head: Matrix,
}

/// A change at one site of the stream for positions `from..to`.
#[derive(Clone, Debug)]
pub struct Injection {
    /// `resid_pre.3` and the like.
    pub site: String,
    pub change: Change,
    pub from: usize,
    pub to: usize,
}

/// Rows by site: `resid_mid.2`, `final_norm`, `logits`.
pub type Seen = BTreeMap<String, Rows>;

impl Transformer {
    /// All positions of `tokens` at once. Every `Mode::Reference` must have its norm by now: see
    /// [`Self::measure`].
    pub fn forward(&self, tokens: &[u32], injections: &[Injection]) -> Seen {
        let mut seen = Seen::new();
        let embedding = |&token: &u32| self.embed.row(token as usize).to_vec();
        let mut stream: Rows = tokens.iter().map(embedding).collect();
        for (layer, block) in self.blocks.iter().enumerate() {
            inject(&mut stream, injections, &format!("resid_pre.{layer}"));
            seen.insert(format!("resid_pre.{layer}"), stream.clone());
            if layer > 0 {
                // One site with two names: both show the row after the injections of both.
                seen.insert(format!("resid_post.{}", layer - 1), stream.clone());
            }

            let attn_out = self.attention_block(&stream, block);
            for (row, branch) in stream.iter_mut().zip(&attn_out) {
                add(row, branch);
            }
            seen.insert(format!("attn_out.{layer}"), attn_out);
            inject(&mut stream, injections, &format!("resid_mid.{layer}"));
            seen.insert(format!("resid_mid.{layer}"), stream.clone());

            let mlp_out: Rows = stream.iter().map(|row| self.mlp_block(row, block)).collect();
            for (row, branch) in stream.iter_mut().zip(&mlp_out) {
                add(row, branch);
            }
            seen.insert(format!("mlp_out.{layer}"), mlp_out);
            inject(&mut stream, injections, &format!("resid_post.{layer}"));
        }
        seen.insert(format!("resid_post.{}", self.config.layers - 1), stream.clone());

        let normed = |row: &Vec<f64>| rms_norm(row, &self.final_norm, self.config.eps);
        let last: Rows = stream.iter().map(normed).collect();
        seen.insert("logits".into(), last.iter().map(|row| matmul(row, &self.head)).collect());
        seen.insert("final_norm".into(), last);
        seen
    }

    /// What attention adds to each row.
    fn attention_block(&self, stream: &Rows, block: &Block) -> Rows {
        let config = &self.config;
        let (mut queries, mut keys, mut values) = (Rows::new(), Rows::new(), Rows::new());
        for (position, row) in stream.iter().enumerate() {
            let x = rms_norm(row, &block.attn_norm, config.eps);
            let (mut q, mut k) = (matmul(&x, &block.q), matmul(&x, &block.k));
            rope(&mut q, config.head_dim, position, config.theta);
            rope(&mut k, config.head_dim, position, config.theta);
            queries.push(q);
            keys.push(k);
            values.push(matmul(&x, &block.v));
        }
        let mix = |(position, q): (usize, &Vec<f64>)| {
            let visible = ..=position;
            let (heads, kv_heads) = (config.heads, config.kv_heads);
            let scale = 1.0 / (config.head_dim as f64).sqrt();
            let seen = (&keys[visible], &values[visible]);
            let mixed = attention(q, seen.0, seen.1, (heads, kv_heads), scale, None);
            matmul(&mixed, &block.o)
        };
        queries.iter().enumerate().map(mix).collect()
    }

    /// What the MLP adds to a row.
    fn mlp_block(&self, row: &[f64], block: &Block) -> Vec<f64> {
        let x = rms_norm(row, &block.mlp_norm, self.config.eps);
        matmul(&gated(&matmul(&x, &block.gate), &matmul(&x, &block.up), silu), &block.down)
    }

    /// Puts N into every `Mode::Reference`: the mean clean norm at the site over the window's
    /// prompt positions, the prompt's first excluded.
    pub fn measure(&self, prompt: &[u32], injections: &mut [Injection]) {
        let clean = self.forward(prompt, &[]);
        for injection in injections {
            if let Mode::Reference(reference) = &mut injection.change.mode {
                let window = injection.from.max(1)..injection.to.min(prompt.len());
                let rows = &clean[&injection.site][window];
                *reference = rows.iter().map(|row| norm(row)).sum::<f64>() / rows.len() as f64;
            }
        }
    }
}

/// Applies what is injected at `site`, in order.
fn inject(stream: &mut Rows, injections: &[Injection], site: &str) {
    for injection in injections.iter().filter(|injection| injection.site == site) {
        let end = injection.to.min(stream.len());
        for row in &mut stream[injection.from.min(end)..end] {
            injection.change.apply(row);
        }
    }
}
