//! Rules about the text of `kernels/`, which no compiler checks.

use std::path::{Path, PathBuf};

/// A file of `kernels/`.
struct Source {
    /// Such as `device.cuh`.
    name: String,
    text: String,
}

fn folder(of: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(of)
}

fn sources(of: &str, extensions: &[&str]) -> Vec<Source> {
    let mut sources = Vec::new();
    for entry in fs_err::read_dir(folder(of)).unwrap() {
        let path = entry.unwrap().path();
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        if extensions.contains(&extension) {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            sources.push(Source { name, text: fs_err::read_to_string(&path).unwrap() });
        }
    }
    sources.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(!sources.is_empty(), "{of} has no sources");
    sources
}

fn kernels() -> Vec<Source> {
    sources("kernels", &["cu", "cuh"])
}

/// The operations and what tests launch, in one text.
fn operations() -> String {
    let folders = ["src/ops", "src/ops/attention", "src/ops/experts", "src/ops/matmul"];
    let files = folders.into_iter().flat_map(|folder| sources(folder, &["rs"]));
    files.map(|source| source.text).collect()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

impl Source {
    /// Without comments.
    fn code(&self) -> String {
        let lines = self.text.lines().map(|line| line.split("//").next().unwrap_or_default());
        lines.collect::<Vec<_>>().join("\n")
    }

    /// The names in the code, with what follows each.
    fn words(code: &str) -> impl Iterator<Item = (&str, &str)> {
        code.split_inclusive(|c| !is_word(c)).filter_map(move |part| {
            let word = part.trim_end_matches(|c| !is_word(c));
            let end = word.as_ptr() as usize - code.as_ptr() as usize + word.len();
            (!word.is_empty()).then(|| (word, code[end..].trim_start()))
        })
    }

    /// As `EXPORT_KERNEL(name, ...)` lists them.
    fn exports(&self) -> Vec<&str> {
        let exports = self.text.split("EXPORT_KERNEL(").skip(1);
        let names: Vec<&str> = exports.filter_map(|rest| rest.split(',').next()).collect();
        assert!(names.iter().all(|name| name.chars().all(is_word)), "{}: {names:?}", self.name);
        names
    }

    /// (name, bytes) of each `static_assert(sizeof(name) == bytes`.
    fn sizes(&self) -> Vec<(&str, &str)> {
        let asserts = self.text.split("static_assert(sizeof(").skip(1);
        let parts = asserts.filter_map(|rest| rest.split_once(") == "));
        parts.filter_map(|(name, rest)| Some((name, rest.split(',').next()?))).collect()
    }
}

/// What differs between compilers and GPUs is behind the functions of two headers; the kernels are
/// one text for all.
#[test]
fn compilers_and_architectures_are_told_apart_in_two_headers() {
    for source in kernels() {
        if ["device.cuh", "ptx.cuh"].contains(&source.name.as_str()) {
            continue;
        }
        for (word, _) in Source::words(&source.text) {
            let tells = word == "__CUDACC__" || word.starts_with("__CUDA_ARCH");
            assert!(!tells, "{}: {word} belongs into device.cuh or ptx.cuh", source.name);
        }
    }
}

#[test]
fn assembly_is_in_ptx_cuh_only() {
    let mut found = false;
    for source in kernels() {
        for (word, rest) in Source::words(&source.code()) {
            let is_assembly = matches!(word, "asm" | "__asm__" | "__asm");
            assert!(!is_assembly || source.name == "ptx.cuh", "{}: {rest:.40}", source.name);
            found |= is_assembly;
        }
    }
    assert!(found, "this test looks for the wrong word");
}

#[test]
fn kernel_files_begin_with_their_contract() {
    for source in sources("kernels", &["cu"]) {
        let stem = source.name.trim_end_matches(".cu");
        let first = source.text.lines().next().unwrap_or_default();
        let name = first.strip_prefix("// ").and_then(|line| line.split(':').next());
        let is_named = name.is_some_and(|name| name.eq_ignore_ascii_case(stem));
        assert!(is_named, "{}: the first line is to be `// {stem}: ...`", source.name);
        assert!(!source.exports().is_empty(), "{}: no kernel", source.name);
    }
}

/// Of the kernels that a macro names by its arguments, `shape!("wgmma", 64, 8, ...)`.
fn shaped(operations: &str) -> Vec<String> {
    let mut names = Vec::new();
    for rest in operations.split("shape!(\"").skip(1) {
        let (path, rest) = rest.split_once("\", ").expect("a path, then features");
        let mut sizes = rest.split(", ");
        let mut size = || sizes.next().expect("features, then tokens");
        let (features, tokens) = (size(), size());
        names.extend(["matmul", "gated"].map(|kind| format!("{kind}_{path}_{features}x{tokens}")));
    }
    names
}

#[test]
fn every_kernel_is_launched_by_an_operation() {
    let operations = operations();
    let shaped = shaped(&operations);
    assert!(!shaped.is_empty(), "src/ops/matmul.rs names its kernels in another way");
    let mut seen: Vec<String> = Vec::new();
    for source in sources("kernels", &["cu"]) {
        for kernel in source.exports() {
            let named = operations.contains(&format!("\"{kernel}\""));
            let named = named || shaped.iter().any(|name| name == kernel);
            assert!(named, "{}: no file of src/ops names {kernel}", source.name);
            assert!(!seen.iter().any(|name| name == kernel), "two kernels {kernel}");
            seen.push(kernel.to_owned());
        }
    }
    for name in &shaped {
        assert!(seen.contains(name), "src/ops/matmul.rs names {name}, which is no kernel");
    }
}

/// A parameter struct has one size, which both sides assert.
#[test]
fn parameters_have_the_same_size_on_both_sides() {
    let operations = operations();
    for source in kernels() {
        for (name, bytes) in source.sizes() {
            if !name.ends_with("Params") {
                continue; // an element of a table, which may have another name
            }
            // One Rust struct serves both products of probes.cu.
            let mirror = match name {
                "ProbeMmaParams" | "ProbeWgmmaParams" => "ProductParams",
                name => name,
            };
            let wanted = format!("assert!(size_of::<{mirror}>() == {bytes}");
            assert!(operations.contains(&wanted), "{}: no `{wanted}` in src/ops", source.name);
        }
    }
}

/// Approximations differ from the processor's results; `exp_f32` and `ln_f32` do not. Two are allowed,
/// in what is rounded to bf16 next.
#[test]
fn only_what_is_rounded_is_approximated() {
    const USERS: [&str; 3] = ["ptx.cuh", "attention_fold.cuh", "matmul_epilogue.cuh"];
    const WORDS: &str = "__expf __exp10f __logf __log2f __log10f __powf __sinf __cosf __tanf __tanhf \
        __sincosf __fdividef __saturatef __frsqrt_rn rsqrtf expf exp2f exp10f expm1f logf log2f \
        log10f log1pf powf sinf cosf tanf tanhf";
    const TEXTS: [&str; 3] = [".approx", ".ftz", "fast_math"];
    for source in kernels() {
        let code = source.code();
        for (word, _) in Source::words(&code) {
            let approximates = WORDS.split_whitespace().any(|other| other == word);
            assert!(!approximates || source.name == "ptx.cuh", "{}: {word}", source.name);
            let allowed = USERS.contains(&source.name.as_str());
            assert!(allowed || !word.ends_with("_approx"), "{}: {word}", source.name);
        }
        for text in TEXTS {
            assert!(!code.contains(text) || source.name == "ptx.cuh", "{}: {text}", source.name);
        }
    }
    let build = fs_err::read_to_string(folder("build.rs")).unwrap();
    assert!(!build.contains("fast_math") && !build.contains("fast-math"), "build.rs");
    for flag in ["\"-fmad=false\"", "\"-ffp-contract=off\""] {
        assert!(build.contains(flag), "build.rs does not pass {flag}");
    }
}

/// The order of atomic additions is not fixed, so sums of them must not depend on it. On the
/// processor an atomic operation on anything but integers does not compile.
#[test]
fn atomics_are_on_integers() {
    for source in kernels() {
        let code = source.code();
        for (word, rest) in Source::words(&code) {
            if word.starts_with("atomic") {
                let statement = rest.split(';').next().unwrap_or_default();
                let is_float = Source::words(statement).any(|(word, _)| {
                    ["float", "double", "float2", "float4", "half", "bf16"].contains(&word)
                });
                assert!(!is_float, "{}: {word}{statement}", source.name);
            }
        }
        for text in ["red.", "atom."] {
            let floats = [".f16", ".bf16", ".f32", ".f64"];
            let is_float =
                |line: &&str| line.contains(text) && floats.iter().any(|f| line.contains(f));
            assert_eq!(code.lines().find(is_float), None, "{}", source.name);
        }
    }
    let shim = fs_err::read_to_string(folder("kernels/host/shim.h")).unwrap();
    let atomics = shim.split("#define SHIM_ATOMIC(").nth(1).expect("the shim's atomics");
    let first = atomics.split('}').next().unwrap_or_default();
    assert!(first.contains("static_assert(std::is_integral<T>::value"), "{first}");
}
