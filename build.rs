//! Compiles every kernels/*.cu twice: to a fatbin for GPUs (where nvcc is found), and to a host
//! library that runs the same source on the processor (feature `host-kernels`).

use std::{
    env, fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
    thread,
};

/// Machine code for Ampere and Hopper, and PTX that other GPUs' drivers compile at load.
const TARGETS: [&str; 3] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_80,code=compute_80",
];
/// Fused multiply-adds are written out, so that the processor and the GPU round alike; register
/// spills are errors.
const FLAGS: [&str; 8] = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "-lineinfo",
    "-fatbin",
    "-Werror",
    "all-warnings",
    "-Xptxas=-warn-spills,-Werror",
];

fn main() {
    // A directory: cargo then watches every header too.
    println!("cargo:rerun-if-changed=kernels");
    for variable in ["NVCC", "CUDA_HOME", "PATH"] {
        println!("cargo:rerun-if-env-changed={variable}"); // nvcc may appear there
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());
    let sources = kernel_sources();
    let fatbins = match find_nvcc() {
        Some(nvcc) => compile_fatbins(&nvcc, &sources, &out),
        None => String::new(), // `inkling doctor` says so
    };
    let mut table = format!("const FATBINS: &[(&[&str], &[u8])] = &[{fatbins}];\n");
    if env::var_os("CARGO_FEATURE_HOST_KERNELS").is_some() {
        table += &compile_host(&sources, &out);
    }
    fs::write(out.join("kernels.rs"), table).unwrap();
}

struct Source {
    path: PathBuf,
    text: String,
    /// As `EXPORT_KERNEL(name, ...)` lists them.
    kernels: Vec<String>,
}

impl Source {
    fn stem(&self) -> &str {
        self.path.file_stem().and_then(|stem| stem.to_str()).unwrap()
    }
}

fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    files.sort();
    files
}

fn kernel_sources() -> Vec<Source> {
    let source = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        let exports = text.split("EXPORT_KERNEL(").skip(1);
        let kernels = exports.filter_map(|rest| rest.split_once(',')).map(|(name, _)| name.into());
        Source { kernels: kernels.collect(), path, text }
    };
    files("kernels", "cu").into_iter().map(source).collect()
}

/// `NVCC`, else the one in `PATH`, else the one in `CUDA_HOME`.
fn find_nvcc() -> Option<PathBuf> {
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvcc"));
    let candidates = match env::var_os("NVCC") {
        Some(named) => vec![PathBuf::from(named)],
        None => [Some("nvcc".into()), home].into_iter().flatten().collect(),
    };
    let works = |nvcc: &PathBuf| {
        Command::new(nvcc).arg("--version").output().is_ok_and(|output| output.status.success())
    };
    let found = candidates.iter().find(|nvcc| works(nvcc)).cloned();
    assert!(
        found.is_some() || env::var_os("NVCC").is_none(),
        "NVCC names {candidates:?}, which does not run"
    );
    found
}

/// The rows of the `FATBINS` table. Images are kept by a hash of all that they are made from.
fn compile_fatbins(nvcc: &Path, sources: &[Source], out: &Path) -> String {
    let version = Command::new(nvcc).arg("--version").output().unwrap().stdout;
    let headers: Vec<_> =
        files("kernels", "cuh").iter().map(|path| fs::read(path).unwrap()).collect();
    let image = |source: &Source| {
        let mut hasher = DefaultHasher::new();
        (&version, &headers, &source.text, FLAGS, TARGETS).hash(&mut hasher);
        out.join(format!("{}-{:016x}.fatbin", source.stem(), hasher.finish()))
    };
    // As many compilers at a time as cargo allows this build.
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    for some in sources.chunks(jobs) {
        thread::scope(|scope| {
            for source in some {
                scope.spawn(|| compile_fatbin(nvcc, source, &image(source)));
            }
        });
    }
    let row = |source: &Source| {
        format!("(&{:?}, include_bytes!(\"{}\")), ", source.kernels, image(source).display())
    };
    sources.iter().map(row).collect()
}

fn compile_fatbin(nvcc: &Path, source: &Source, image: &Path) {
    if image.is_file() {
        return;
    }
    let part = image.with_extension("part");
    let mut command = Command::new(nvcc);
    command.args(FLAGS).arg("-Ikernels").args(TARGETS.map(|target| format!("-gencode={target}")));
    command.arg(&source.path).arg("-o").arg(&part);
    let run = command.output().unwrap();
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{command:?}\n{said}");
    // A remark only, for the compiler: it waits after each of a warpgroup's products.
    assert!(!said.contains("(C75"), "{command:?}\nserialises warpgroup products:\n{said}");
    fs::rename(part, image).unwrap();
}

/// Compiles the kernels as C++ with the shim; returns their declarations and the table of them.
fn compile_host(sources: &[Source], out: &Path) -> String {
    let mut host = cc::Build::new();
    host.cpp(true)
        .std("c++17")
        .opt_level(2)
        .flag("-ffp-contract=off")
        .flag("-Wno-unknown-pragmas")
        .include("kernels");
    host.file("kernels/host/shim.cpp");
    for source in sources {
        // cc would hand a .cu to nvcc; a one-line .cpp keeps it a plain C++ compile.
        let cpp = out.join(source.stem()).with_extension("cpp");
        let line = format!("#include \"{}\"\n", source.path.canonicalize().unwrap().display());
        if fs::read_to_string(&cpp).ok().as_ref() != Some(&line) {
            fs::write(&cpp, line).unwrap();
        }
        host.file(cpp);
    }
    host.compile("host_kernels");

    let args = "grid: &[u32; 3], block: &[u32; 3], shared: usize, params: *const std::ffi::c_void";
    let names = || sources.iter().flat_map(|source| &source.kernels);
    let declarations: Vec<_> = names().map(|name| format!("fn host_{name}({args});")).collect();
    let rows: Vec<_> = names().map(|name| format!("({name:?}, host_{name})")).collect();
    let (declarations, rows) = (declarations.join(" "), rows.join(", "));
    format!(
        "type HostKernel = unsafe extern \"C\" fn({args});\n\
         unsafe extern \"C\" {{ {declarations} }}\n\
         const HOST_KERNELS: &[(&str, HostKernel)] = &[{rows}];\n"
    )
}
