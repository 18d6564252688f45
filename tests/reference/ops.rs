//! Each operation by its definition, in f64, one row at a time.

/// A (rows, cols) matrix, row by row.
#[derive(Clone, Debug)]
pub struct Matrix {
    pub rows: usize,
    pub cols: usize,
    pub data: Vec<f64>,
}

impl Matrix {
    pub fn row(&self, row: usize) -> &[f64] {
        &self.data[row * self.cols..][..self.cols]
    }
}

/// What is added to a row of the stream: a vector, a strength, and its unit.
#[derive(Clone, Debug)]
pub struct Change {
    pub vector: Vec<f64>,
    pub strength: f64,
    pub mode: Mode,
}

/// The unit of a strength s.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// s·v.
    Raw,
    /// s·v/‖v‖.
    Unit,
    /// s·N·v/‖v‖ with this N.
    Reference(f64),
    /// s·‖h‖·v/‖v‖, h the row before the change.
    Row,
}

pub fn norm(row: &[f64]) -> f64 {
    row.iter().map(|x| x * x).sum::<f64>().sqrt()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

pub fn add(row: &mut [f64], other: &[f64]) {
    assert_eq!(row.len(), other.len());
    for (x, y) in row.iter_mut().zip(other) {
        *x += y;
    }
}

impl Change {
    /// h += the change.
    pub fn apply(&self, row: &mut [f64]) {
        let scale = match self.mode {
            Mode::Raw => 1.0,
            Mode::Unit => 1.0 / norm(&self.vector),
            Mode::Reference(reference) => reference / norm(&self.vector),
            Mode::Row => norm(row) / norm(&self.vector),
        };
        let change: Vec<f64> = self.vector.iter().map(|v| self.strength * scale * v).collect();
        add(row, &change);
    }
}

/// x / √(mean x² + eps) · gain.
pub fn rms_norm(row: &[f64], gain: &[f64], eps: f64) -> Vec<f64> {
    let mean_square = dot(row, row) / row.len() as f64;
    let scale = 1.0 / (mean_square + eps).sqrt();
    row.iter().zip(gain).map(|(x, g)| x * scale * g).collect()
}

/// r += branch, then the changes in order; the stream's new row and its norm.
pub fn residual_norm(
    stream: &[f64],
    branch: &[f64],
    changes: &[Change],
    gain: &[f64],
    eps: f64,
) -> (Vec<f64>, Vec<f64>) {
    let mut row = stream.to_vec();
    add(&mut row, branch);
    for change in changes {
        change.apply(&mut row);
    }
    let normed = rms_norm(&row, gain, eps);
    (row, normed)
}

/// y = W x, W (out, in).
pub fn matmul(x: &[f64], weight: &Matrix) -> Vec<f64> {
    (0..weight.rows).map(|out| dot(x, weight.row(out))).collect()
}

/// Turns each head of a (heads · `head_dim`) row: component i with component i + `head_dim`/2, by
/// position · theta^(−2i/`head_dim`). The angle is rounded as transformers rounds it, in f32.
pub fn rope(row: &mut [f64], head_dim: usize, position: usize, theta: f32) {
    let half = head_dim / 2;
    for head in row.chunks_exact_mut(head_dim) {
        for i in 0..half {
            let frequency = 1.0 / theta.powf((2 * i) as f32 / head_dim as f32);
            let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
            let (a, b) = (head[i], head[i + half]);
            head[i] = a * cos - b * sin;
            head[i + half] = b * cos + a * sin;
        }
    }
}

/// Softmax.
pub fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

/// One row's queries (heads · `head_dim`) over the keys and values it sees, each
/// (`kv_heads` · `head_dim`): softmax(scale · q·k) · v, a score s being cap · tanh(s / cap) where
/// there is a cap; heads share a key head in groups.
pub fn attention(
    query: &[f64],
    keys: &[Vec<f64>],
    values: &[Vec<f64>],
    (heads, kv_heads): (usize, usize),
    scale: f64,
    soft_cap: Option<f64>,
) -> Vec<f64> {
    let head_dim = query.len() / heads;
    let capped = |score: f64| soft_cap.map_or(score, |cap| cap * (score / cap).tanh());
    let mut out = Vec::with_capacity(query.len());
    for (head, q) in query.chunks_exact(head_dim).enumerate() {
        let own = head / (heads / kv_heads) * head_dim..;
        let part = |row: &'_ [f64]| row[own.clone()][..head_dim].to_vec();
        let scores: Vec<f64> = keys.iter().map(|k| capped(dot(q, &part(k)) * scale)).collect();
        let mut mixed = vec![0.0; head_dim];
        for (weight, value) in softmax(&scores).iter().zip(values) {
            let weighted: Vec<f64> = part(value).iter().map(|v| weight * v).collect();
            add(&mut mixed, &weighted);
        }
        out.extend(mixed);
    }
    out
}

/// x / (1 + e⁻ˣ).
pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// activation(gate) · up.
pub fn gated(gate: &[f64], up: &[f64], activation: impl Fn(f64) -> f64) -> Vec<f64> {
    gate.iter().zip(up).map(|(g, u)| activation(*g) * u).collect()
}
