//! Every operation of the forward pass against its definition in f64, on every instruction set of
//! this machine, which must agree bit for bit. Outputs, unused rows and unused cache start as NaN.
//!
//! Tolerances are worst cases of the arithmetic, named where they are used: a chain of k fused
//! multiply-adds in f32 is off by at most k · 2⁻²⁴ · Σ|terms|, a result rounded to bf16 by 2⁻⁸ of
//! itself.

#[path = "../common/mod.rs"]
#[allow(dead_code, reason = "shared by several test binaries")]
mod common;
#[path = "../reference/mod.rs"]
#[allow(dead_code, reason = "shared by several test binaries")]
mod reference;

mod attention;
mod experts;
mod heads;
mod hooks;
mod logits;
mod matmul;
mod probe;
mod ptx;
mod stream;
#[allow(dead_code, reason = "shared with another test binary")]
mod tools;
