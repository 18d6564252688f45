//! All of CUDA: the driver, memory, kernels and graphs. The same kernels also run on the
//! processor (feature `host-kernels`), through a shim that is compiled with them.
//!
//! A [`Cuda`] has one stream, which orders all its work, and one for copies of captured rows to
//! the host, which run beside it; one thread owns both.

mod memory;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Instant,
};

use cudarc::{
    driver::{
        CudaContext, CudaEvent, CudaFunction, CudaGraph, CudaStream, DeviceRepr, DriverError,
        LaunchConfig, PushKernelArg,
        sys::{CUdevice_attribute, CUevent_flags, CUfunction_attribute, CUgraphInstantiate_flags},
        sys::{CUstreamCaptureMode, is_culib_present},
    },
    nvrtc::Ptx,
};

use memory::Ring;
pub(super) use memory::{Memory, Pinned};

use super::Element;
use crate::error::{Error, Result};

// FATBINS: &[(&[&str], &[u8])], the kernels of each image; and with host-kernels HOST_KERNELS:
// &[(&str, HostKernel)].
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// A kernel's parameters.
///
/// # Safety
/// `repr(C)` without padding, field for field the struct that the kernel takes.
pub(crate) unsafe trait Params: Copy {}

/// How many blocks of how many threads, and bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch {
    pub grid: [u32; 3],
    pub block: u32,
    pub shared: u32,
}

impl Launch {
    /// Blocks in one dimension, no dynamic shared memory.
    pub(crate) fn new(grid: usize, block: u32) -> Self {
        Self { grid: [grid as u32, 1, 1], block, shared: 0 }
    }
}

/// Which of the two families of matrix kernels runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatrixPath {
    /// Hopper's warpgroup instructions (compute capability 9.0).
    Wgmma,
    /// `mma.sync`, from compute capability 8.0 on.
    Mma,
}

/// The CUDA kernels on a GPU or on the processor.
pub struct Cuda {
    backend: Backend,
    path: MatrixPath,
    /// Launches until it fails, see [`Cuda::failing_after`].
    remaining: Cell<Option<u64>>,
}

enum Backend {
    Gpu(Box<Gpu>),
    #[cfg(feature = "host-kernels")]
    Host,
}

struct Gpu {
    stream: Arc<CudaStream>,
    /// Only copies to the host that [`Cuda::drain`] queues.
    copies: Arc<CudaStream>,
    functions: HashMap<&'static str, CudaFunction>,
    name: String,
    capability: (i32, i32),
    multiprocessors: u32,
    graphs: RefCell<HashMap<u64, CudaGraph>>,
    ring: Arc<Mutex<Ring>>,
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Nothing may run when the kernels are unloaded, and no graph may be left that names them.
        for stream in [&self.stream, &self.copies] {
            stream.context().record_err(stream.synchronize());
        }
        self.graphs.borrow_mut().clear();
    }
}

// SAFETY: `CudaGraph` holds raw handles, which any one thread at a time may use; a `Gpu` is not
// `Sync`, so no two threads do.
unsafe impl Send for Gpu {}

/// What a GPU is, for `doctor` and results.
#[derive(Clone, Debug)]
pub struct GpuFacts {
    /// As the driver names it.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Bytes of device memory: free now, and in all.
    pub memory: (usize, usize),
}

fn failed(what: &str, error: DriverError) -> Error {
    let name = error.error_string().ok().and_then(|text| text.to_str().ok()).unwrap_or("unknown");
    Error::new(what).got(format!("{name} (CUDA error {})", error.0 as u32))
}

/// Kernels that this build has for GPUs.
pub fn gpu_kernels() -> usize {
    FATBINS.iter().map(|(names, _)| names.len()).sum()
}

/// Whether this build can run the kernels on the processor.
pub fn has_host_kernels() -> bool {
    cfg!(feature = "host-kernels")
}

/// The GPUs of this machine.
///
/// # Errors
/// There is no driver, or it cannot be used.
pub fn gpus() -> Result<usize> {
    // SAFETY: only looks whether libcuda can be loaded.
    if !unsafe { is_culib_present() } {
        return Err(Error::new("there is no CUDA driver on this machine")
            .expected("libcuda.so.1, of driver 580 or later")
            .hint("use --device cpu"));
    }
    let count = CudaContext::device_count().map_err(|e| failed("the CUDA driver cannot start", e));
    Ok(count? as usize)
}

/// The oldest GPUs that the kernels are compiled for.
const OLDEST: (i32, i32) = (8, 0);

impl Cuda {
    /// The GPU with this ordinal.
    ///
    /// # Errors
    /// There is no driver, no such GPU, or no kernel for it in this build.
    pub fn gpu(ordinal: usize) -> Result<Self> {
        if FATBINS.is_empty() {
            return Err(Error::new("this build has no GPU kernels")
                .at(format!("cuda:{ordinal}"))
                .expected("nvcc 13.0 when it was built")
                .hint("run scripts/install-nvcc.sh, set NVCC and build again"));
        }
        let count = gpus()?;
        if ordinal >= count {
            return Err(Error::new("no such GPU")
                .expected(format!("an ordinal below {count}"))
                .got(format!("cuda:{ordinal}")));
        }
        let start = |error| failed("the GPU cannot be used", error);
        let context = CudaContext::new(ordinal).map_err(start)?;
        // SAFETY: no buffer exists yet; the first stream made next orders every later access, but
        // for those that `drain` orders by an event and its caller by a mark.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(start)?; // the default one can't be captured
        let copies = context.new_stream().map_err(start)?;
        let capability = context.compute_capability().map_err(start)?;
        let name = context.name().map_err(start)?;
        if capability < OLDEST {
            return Err(Error::new("this GPU is too old")
                .expected("compute capability 8.0 or later")
                .got(format!("{name} with {}.{}", capability.0, capability.1)));
        }
        let attribute = |which| context.attribute(which).map_err(start);
        let multiprocessors =
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let most =
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let mut functions = HashMap::new();
        for &(kernels, image) in FATBINS {
            let load = |kernel: &str, error| {
                failed("a kernel cannot be loaded", error)
                    .at(kernel)
                    .expected(format!("code for {name}, driver 580 or later"))
            };
            let module = context.load_module(Ptx::from_binary(image.to_vec()));
            let module = module.map_err(|error| load(kernels[0], error))?;
            for &kernel in kernels {
                let function = module.load_function(kernel).map_err(|e| load(kernel, e))?;
                let fixed = CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
                let fixed = function.get_attribute(fixed).map_err(|e| load(kernel, e))?;
                // All the same division of a multiprocessor's memory, the one that holds most blocks.
                for (attribute, value) in [
                    (
                        CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                        most - fixed,
                    ),
                    (CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
                ] {
                    function.set_attribute(attribute, value).map_err(|e| load(kernel, e))?;
                }
                functions.insert(kernel, function);
            }
        }
        let path = if capability == (9, 0) { MatrixPath::Wgmma } else { MatrixPath::Mma };
        let (graphs, ring) = (RefCell::default(), Arc::new(Mutex::new(Ring::new(&stream)?)));
        let gpu =
            Gpu { stream, copies, functions, name, capability, multiprocessors, graphs, ring };
        Ok(Self { backend: Backend::Gpu(Box::new(gpu)), path, remaining: Cell::new(None) })
    }

    /// The kernels on the processor.
    ///
    /// # Errors
    /// This build has none.
    #[cfg(feature = "host-kernels")]
    pub fn host(path: MatrixPath) -> Result<Self> {
        Ok(Self { backend: Backend::Host, path, remaining: Cell::new(None) })
    }

    /// The kernels on the processor.
    ///
    /// # Errors
    /// This build has none.
    #[cfg(not(feature = "host-kernels"))]
    pub fn host(_: MatrixPath) -> Result<Self> {
        Err(Error::new("this build has no host kernels")
            .hint("build with --features host-kernels (it needs a C++ compiler)"))
    }

    /// The same GPU with the other family of matrix kernels, for tests and comparisons.
    ///
    /// # Errors
    /// The GPU does not have it.
    pub fn with_path(mut self, path: MatrixPath) -> Result<Self> {
        if path == MatrixPath::Wgmma && self.path != path {
            return Err(Error::new("this GPU has no warpgroup matrix instructions")
                .expected("compute capability 9.0"));
        }
        self.path = path;
        Ok(self)
    }

    /// Fails after so many launches, as a GPU does that is lost: for tests.
    #[must_use]
    pub fn failing_after(self, launches: Option<u64>) -> Self {
        self.remaining.set(launches);
        self
    }

    /// Which matrix kernels run.
    pub fn path(&self) -> MatrixPath {
        self.path
    }

    /// Whether it is a GPU.
    pub fn is_gpu(&self) -> bool {
        matches!(self.backend, Backend::Gpu(_))
    }

    /// What the GPU is; `None` on the processor.
    ///
    /// # Errors
    /// The GPU has failed.
    pub fn facts(&self) -> Result<Option<GpuFacts>> {
        let Some(gpu) = self.as_gpu() else { return Ok(None) };
        let memory = gpu.stream.context().mem_get_info();
        let memory = memory.map_err(|error| gpu.lost(error))?;
        Ok(Some(GpuFacts { name: gpu.name.clone(), capability: gpu.capability, memory }))
    }

    /// Names the arithmetic: results of equal names are the same, bit for bit.
    pub fn arithmetic(&self) -> String {
        let path = if self.path == MatrixPath::Wgmma { "wgmma" } else { "mma" };
        match self.as_gpu() {
            Some(gpu) => format!("{path} sm_{}{}", gpu.capability.0, gpu.capability.1),
            None => path.into(),
        }
    }

    /// Blocks that run side by side, one a multiprocessor.
    pub(crate) fn multiprocessors(&self) -> usize {
        self.as_gpu().map_or(4, |gpu| gpu.multiprocessors as usize)
    }

    fn as_gpu(&self) -> Option<&Gpu> {
        match &self.backend {
            Backend::Gpu(gpu) => Some(gpu),
            #[cfg(feature = "host-kernels")]
            Backend::Host => None,
        }
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// The addresses in `params` are valid for all that the kernel reads and writes under `launch`.
    ///
    /// # Errors
    /// It cannot be queued, or something queued before has failed.
    pub(crate) unsafe fn launch<P: Params>(
        &self,
        kernel: &'static str,
        launch: Launch,
        params: &P,
    ) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        match self.remaining.get() {
            Some(0) => return Err(Error::new("the device was made to fail").at(kernel)),
            remaining => self.remaining.set(remaining.map(|launches| launches - 1)),
        }
        match &self.backend {
            Backend::Gpu(gpu) => {
                let function = gpu.functions.get(kernel);
                let function = function.unwrap_or_else(|| panic!("no kernel {kernel}"));
                let [x, y, z] = launch.grid;
                let config = LaunchConfig {
                    grid_dim: (x, y, z),
                    block_dim: (launch.block, 1, 1),
                    shared_mem_bytes: launch.shared,
                };
                let params = Arg(*params);
                let mut builder = gpu.stream.launch_builder(function);
                builder.arg(&params);
                // SAFETY: as required of the caller; the layout is `Params`'s promise.
                unsafe { builder.launch(config) }.map(|_| ()).map_err(|error| {
                    failed("a kernel cannot be launched", error)
                        .at(format!("{kernel} with {launch:?} on {}", gpu.name))
                })
            }
            #[cfg(feature = "host-kernels")]
            Backend::Host => {
                let run = HOST_KERNELS.iter().find(|(name, _)| *name == kernel);
                let (_, run) = run.unwrap_or_else(|| panic!("no kernel {kernel}"));
                let block = [launch.block, 1, 1];
                let params = std::ptr::from_ref(params).cast();
                // SAFETY: as required of the caller.
                unsafe { run(&launch.grid, &block, launch.shared as usize, params) };
                Ok(())
            }
        }
    }

    /// Runs `work`, which queues the same kernels with the same parameters each time it is called
    /// with this key. On a GPU it is recorded the first time, and replayed from then on.
    ///
    /// # Errors
    /// What `work` returns, and what recording or replaying fails with.
    pub(crate) fn replay(&self, key: u64, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let Some(gpu) = self.as_gpu() else { return work() };
        if let Some(graph) = gpu.graphs.borrow().get(&key) {
            return graph.launch().map_err(|error| gpu.lost(error));
        }
        let capture = |error| failed("a step cannot be recorded", error).at(gpu.name.clone());
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        gpu.stream.begin_capture(mode).map_err(capture)?;
        let queued = work();
        let graph = gpu.stream.end_capture(CUgraphInstantiate_flags(0)).map_err(capture);
        queued?;
        let graph = graph?.ok_or_else(|| Error::new("a recorded step is empty"))?;
        graph.launch().map_err(|error| gpu.lost(error))?;
        gpu.graphs.borrow_mut().insert(key, graph);
        Ok(())
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        let Some(gpu) = self.as_gpu() else { return Ok(()) };
        gpu.stream.synchronize().map_err(|error| gpu.lost(error))
    }

    /// A point in the stream.
    ///
    /// # Errors
    /// Something queued before has failed.
    pub(crate) fn mark(&self) -> Result<Mark> {
        let Some(gpu) = self.as_gpu() else { return Ok(Mark::now()) };
        let flags = CUevent_flags::CU_EVENT_DEFAULT;
        let event = gpu.stream.record_event(Some(flags)).map_err(|error| gpu.lost(error))?;
        Ok(Mark(Point::Event(event)))
    }

    /// Queues a copy to the host behind all that is queued now and beside what is queued later;
    /// gives its end.
    pub(super) fn drain<T: Element>(
        &self,
        from: &Memory<T>,
        (start, len): (usize, usize),
        to: &mut Pinned<T>,
    ) -> Result<Mark> {
        let gpu = self.as_gpu().expect("memory of a GPU belongs to a GPU");
        let lost = |error| gpu.lost(error);
        let written = gpu.stream.record_event(None).map_err(lost)?;
        gpu.copies.wait(&written).map_err(lost)?;
        from.fetch_on(&gpu.copies, (start, len), (to, 0))?;
        Ok(Mark(Point::Event(gpu.copies.record_event(None).map_err(lost)?)))
    }

    /// `len` zeros in the GPU's memory; `None` on the processor.
    pub(super) fn zeroed<T: Element>(&self, len: usize) -> Result<Option<Memory<T>>> {
        let Some(gpu) = self.as_gpu() else { return Ok(None) };
        Memory::zeroed(&gpu.stream, &gpu.ring, &gpu.name, len).map(Some)
    }

    /// Pinned host memory; `None` on the processor.
    pub(super) fn pinned<T: Element>(&self, len: usize) -> Result<Option<Pinned<T>>> {
        self.as_gpu().map(|gpu| Pinned::new(gpu.stream.context(), len)).transpose()
    }
}

impl Gpu {
    fn lost(&self, error: DriverError) -> Error {
        failed("the GPU has failed", error)
            .at(self.name.clone())
            .hint("what was stored is kept: run the same command again to go on")
    }
}

/// A point in the order of work.
pub(crate) struct Mark(Point);

enum Point {
    Time(Instant),
    Event(CudaEvent),
}

impl Mark {
    /// Now, where nothing is queued.
    pub(super) fn now() -> Self {
        Self(Point::Time(Instant::now()))
    }

    /// Waits until everything queued before it is done.
    ///
    /// # Errors
    /// Something queued before it has failed.
    pub(crate) fn wait(&self) -> Result<()> {
        match &self.0 {
            Point::Time(_) => Ok(()),
            Point::Event(event) => event.synchronize().map_err(|error| {
                failed("the GPU has failed", error)
                    .hint("what was stored is kept: run the same command again to go on")
            }),
        }
    }

    /// Seconds from it to a later one.
    ///
    /// # Errors
    /// The GPU has failed.
    pub(crate) fn seconds_to(&self, later: &Self) -> Result<f64> {
        match (&self.0, &later.0) {
            (Point::Time(start), Point::Time(end)) => Ok((*end - *start).as_secs_f64()),
            (Point::Event(start), Point::Event(end)) => {
                let time = start.elapsed_ms(end);
                Ok(f64::from(time.map_err(|error| failed("the GPU has failed", error))?) / 1e3)
            }
            _ => unreachable!("two marks of one device"),
        }
    }
}

/// A parameter struct as cudarc takes it.
#[repr(transparent)]
struct Arg<P>(P);
// SAFETY: plain numbers, as `Params` promises.
unsafe impl<P: Params> DeviceRepr for Arg<P> {}
