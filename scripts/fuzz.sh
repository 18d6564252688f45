#!/usr/bin/env bash
# Fuzzes every reader of files for SECONDS each, one after another: scripts/fuzz.sh SECONDS [TARGET ...]
#
# Needs a nightly toolchain and `cargo install cargo-fuzz`. What is new goes to fuzz/corpus, what fails to
# fuzz/artifacts.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:?seconds for each target}
shift
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(gguf safetensors config tokenizer vectors requests)

for target in "${targets[@]}"; do
    mkdir -p "fuzz/corpus/$target"
    # No sanitizer: the readers have no unsafe code. Arithmetic that overflows is a failure.
    cargo +nightly fuzz run --sanitizer none --debug-assertions "$target" \
        "fuzz/corpus/$target" "tests/corpus/$target" -- \
        -dict="fuzz/dictionaries/$target.txt" -max_len=16384 -timeout=10 -rss_limit_mb=2048 \
        -max_total_time="$seconds" -print_final_stats=1
done
