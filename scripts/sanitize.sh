#!/usr/bin/env bash
# The kernels' tests under AddressSanitizer, on the processor, with threads in three orders:
#
#   scripts/sanitize.sh [TARGET_DIR] [TEST_FILTER...]
#
# TARGET_DIR (default target/sanitize) keeps the build apart from others'. Needs GCC and its libasan, no nightly Rust.
#
# What it proves: in these tests no kernel reads or writes outside the arrays it was given, the dynamic shared memory
# of its launch, or its own local arrays, asynchronous copies included. What it can't see: up to 64 bytes behind an
# array, which are the array's own spare room; the static __shared__ arrays; Rust's own accesses, for the code that
# does not come from kernels/ is not instrumented; and what only a GPU has, its alignment rules and its memory model.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${1:-target/sanitize}
[ $# -eq 0 ] || shift
mkdir -p "$target/no-nvcc"
target=$(cd "$target" && pwd)

# The GPU takes no part, and its driver gets on badly with the sanitizer: build without its kernels.
printf '#!/bin/sh\nexit 1\n' > "$target/no-nvcc/nvcc"
chmod +x "$target/no-nvcc/nvcc"
unset NVCC CUDA_HOME REQUIRE_GPU
export PATH=$target/no-nvcc:$PATH

# With a --target, flags are for the tests alone and not for build scripts, which rustc loads into itself.
host=$(rustc -vV | sed -n 's/^host: //p')
export CXXFLAGS="-fsanitize=address -fno-omit-frame-pointer -g1"
# rustc tells the linker to leave out what -fsanitize brings, unless default libraries are asked for.
export RUSTFLAGS="-Clink-arg=-fsanitize=address -Cdefault-linker-libraries=yes"
export CARGO_INCREMENTAL=1
# What tests leave allocated is no error here.
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:strict_string_checks=1

build=(cargo test --release --locked --features host-kernels --test operations --target "$host" --target-dir "$target")
log=$target/build.log
"${build[@]}" --no-run 2>&1 | tee "$log"
tests=$(sed -n 's/^ *Executable .*(\(.*\))$/\1/p' "$log")
if [[ $(nm -u "$tests") != *__asan_report_store* ]]; then
    echo "sanitize.sh: $tests is not instrumented" >&2
    exit 1
fi

for order in forward reverse 7; do
    echo "== threads in order: $order"
    SHIM_ORDER=$order "$tests" "$@"
done
echo "sanitize.sh: no access out of bounds"
