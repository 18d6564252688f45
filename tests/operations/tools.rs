//! Devices, inputs with outliers, and comparisons.

use std::fmt::Display;

use half::bf16;
use inkling::{
    device::{
        Buffer, Cpu, Cuda, Device,
        cpu::{Isa, Products},
        cuda::{MatrixPath, has_host_kernels},
    },
    ops::{Float, activations::Activations, matmul::Dtype},
};

/// Unit roundoff of f32: rounding moves a number by at most this part of it.
pub const U: f64 = 1.0 / 16_777_216.0;

/// A type of matmul inputs and of the cache, with its rounding done by other code.
pub trait Stored: Float {
    /// Rounding an f32 to it moves the number by at most this part of it.
    const ROUNDOFF: f64;
    /// The nearest number of the type.
    fn nearest(value: f32) -> f64;
}

impl Stored for f32 {
    const ROUNDOFF: f64 = 0.0;
    fn nearest(value: f32) -> f64 {
        f64::from(value)
    }
}

impl Stored for bf16 {
    const ROUNDOFF: f64 = 1.0 / 256.0;
    fn nearest(value: f32) -> f64 {
        bf16::from_f32(value).to_f64()
    }
}

/// A device of one thread with room for `workspace` f32s of matmul input.
pub fn device(isa: Isa, workspace: usize) -> Device {
    Device::Cpu(Cpu::new(isa, 1, workspace).unwrap())
}

/// The instruction sets of this machine by what bits products of `T` have. Those with bf16 weights
/// are emulated everywhere.
pub fn families<T: Float>() -> Vec<(&'static str, Vec<Isa>)> {
    let here = || Isa::ALL.into_iter().filter(|isa| isa.check().is_ok());
    if T::DTYPE == Dtype::F32 {
        return vec![("cpu", here().collect())];
    }
    let names =
        [(Products::Chains, "cpu"), (Products::Pairs, "cpu, pairs"), (Products::Tiles, "cpu, AMX")];
    let family = |products| here().filter(|isa| isa.products() == products).collect();
    names.into_iter().map(|(products, name)| (name, family(products))).collect()
}

/// Runs a case on every instruction set of this machine: its outputs, the same bits on each.
#[track_caller]
pub fn on_every_isa(workspace: usize, case: impl Fn(&Device) -> Vec<Vec<f32>>) -> Vec<Vec<f32>> {
    let families = families::<f32>();
    assert_eq!(families.len(), 1, "without products of bf16 all have the same bits");
    on_isas(&families[0].1, workspace, case)
}

/// Likewise on these.
#[track_caller]
fn on_isas(
    isas: &[Isa],
    workspace: usize,
    case: impl Fn(&Device) -> Vec<Vec<f32>>,
) -> Vec<Vec<f32>> {
    let outputs = case(&device(isas[0], workspace));
    for &isa in &isas[1..] {
        let others = case(&device(isa, workspace));
        assert_eq!(outputs.len(), others.len());
        for (at, (one, other)) in outputs.iter().zip(&others).enumerate() {
            assert_eq!(first_difference(one, other), None, "output {at}: {} and {isa}", isas[0]);
        }
    }
    outputs
}

/// The outputs of a case with products of `T`, of each family of instruction sets.
#[track_caller]
pub fn on_every_family<T: Float>(
    workspace: usize,
    case: impl Fn(&Device) -> Vec<Vec<f32>>,
) -> Vec<(String, Vec<Vec<f32>>)> {
    let run = |(name, isas): (&str, Vec<_>)| (name.into(), on_isas(&isas, workspace, &case));
    families::<T>().into_iter().map(run).collect()
}

/// Everything that runs the CUDA kernels: this processor, where the build has them for it, and the
/// GPU. With `REQUIRE_GPU` set a missing GPU is a failure, so that a run that is meant for it cannot
/// pass without.
pub fn kernel_devices() -> Vec<(String, Device)> {
    let paths = [(MatrixPath::Wgmma, "wgmma"), (MatrixPath::Mma, "mma")];
    let mut devices = Vec::new();
    if has_host_kernels() {
        devices.extend(paths.map(|(path, name)| {
            (format!("host kernels, {name}"), Device::Cuda(Cuda::host(path).unwrap()))
        }));
    }
    match Cuda::gpu(0) {
        Ok(gpu) => {
            for (path, name) in paths.into_iter().filter(|(path, _)| *path != gpu.path()) {
                let gpu = Cuda::gpu(0).unwrap();
                let gpu =
                    gpu.with_path(path).map(|gpu| (format!("GPU, {name}"), Device::Cuda(gpu)));
                devices.extend(gpu);
            }
            devices.push(("GPU".into(), Device::Cuda(gpu)));
        }
        Err(error) => assert!(std::env::var_os("REQUIRE_GPU").is_none(), "{error}"),
    }
    devices
}

/// The outputs of a case on the processor and, where `T` is what the kernels compute with, on all
/// that runs them; each with the device's name.
#[track_caller]
pub fn on_every_device<T: Float>(
    workspace: usize,
    case: impl Fn(&Device) -> Vec<Vec<f32>>,
) -> Vec<(String, Vec<Vec<f32>>)> {
    let mut outputs = on_every_family::<T>(workspace, &case);
    if T::DTYPE == Dtype::Bf16 {
        let kernels = kernel_devices().into_iter();
        outputs.extend(kernels.map(|(name, device)| {
            let outputs = case(&device);
            (name, outputs)
        }));
    }
    outputs
}

/// The first place where two lists differ in a bit.
pub fn first_difference(one: &[f32], other: &[f32]) -> Option<usize> {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).position(|(a, b)| a.to_bits() != b.to_bits())
}

/// Fails where `got` is further than `tolerance` from `want`, or is NaN.
#[track_caller]
pub fn close(what: &dyn Display, got: f32, want: f64, tolerance: f64) {
    let off = (f64::from(got) - want).abs();
    assert!(off <= tolerance, "{what}: {got} instead of {want}, off by {off:e} > {tolerance:e}");
}

/// Whether nothing was written here.
pub fn all_nan(values: &[f32]) -> bool {
    values.iter().all(|v| v.is_nan())
}

/// `len` NaNs.
pub fn nans<T: Float>(device: &Device, len: usize) -> Buffer<T> {
    Buffer::upload(device, &vec![T::from_f32(f32::NAN); len]).unwrap()
}

/// A copy of the values, each rounded to T, and of `spare` NaNs after them.
pub fn upload<T: Float>(device: &Device, values: &[f32], spare: usize) -> Buffer<T> {
    let mut rounded: Vec<T> = values.iter().map(|&v| T::from_f32(v)).collect();
    rounded.resize(values.len() + spare, T::from_f32(f32::NAN));
    Buffer::upload(device, &rounded).unwrap()
}

/// (rows, dim) rounded to T, and a row of NaNs after them.
pub fn activations<T: Float>(device: &Device, dim: usize, values: &[f32]) -> Activations<T> {
    activations_before(device, dim, values, 1)
}

/// Likewise with so many rows of NaNs.
pub fn activations_before<T: Float>(
    device: &Device,
    dim: usize,
    values: &[f32],
    nan_rows: usize,
) -> Activations<T> {
    let mut rounded: Vec<T> = values.iter().map(|&v| T::from_f32(v)).collect();
    rounded.resize(values.len() + nan_rows * dim, T::from_f32(f32::NAN));
    Activations::upload(device, dim, &rounded).unwrap()
}

/// `rows` rows of NaNs.
pub fn nan_activations<T: Float>(device: &Device, rows: usize, dim: usize) -> Activations<T> {
    Activations::upload(device, dim, &vec![T::from_f32(f32::NAN); rows * dim]).unwrap()
}

/// All rows.
pub fn read_rows<T: Float>(rows: &Activations<T>) -> Vec<f32> {
    rows.read().unwrap().into_iter().map(T::to_f32).collect()
}

/// All of a buffer.
pub fn read<T: Float>(buffer: &Buffer<T>) -> Vec<f32> {
    let mut values = vec![T::default(); buffer.len()];
    buffer.read(0, &mut values).unwrap();
    values.into_iter().map(T::to_f32).collect()
}

/// All of a buffer.
pub fn read_u32(buffer: &Buffer<u32>) -> Vec<u32> {
    let mut values = vec![0; buffer.len()];
    buffer.read(0, &mut values).unwrap();
    values
}

/// As f64.
pub fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

/// Sizes without signs.
pub fn sizes(values: &[f64]) -> Vec<f64> {
    values.iter().map(|v| v.abs()).collect()
}

/// Numbers that look random (`SplitMix64`).
pub struct Numbers(u64);

impl Numbers {
    /// A stream of its own for every seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Between -1 and 1.
    pub fn draw(&mut self) -> f32 {
        (self.word() >> 40) as f32 / 8_388_608.0 - 1.0
    }

    /// Several between -1 and 1.
    pub fn list(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.draw()).collect()
    }

    /// Likewise, about one in 97 `factor` times as large.
    pub fn with_outliers(&mut self, count: usize, factor: f32) -> Vec<f32> {
        let number = |_| {
            let scale = if self.word().is_multiple_of(97) { factor } else { 1.0 };
            scale * self.draw()
        };
        (0..count).map(number).collect()
    }
}
