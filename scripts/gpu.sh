#!/usr/bin/env bash
# Everything that only a GPU can show: checks, timings, peers and the table of goals, with a binary built elsewhere.
#
#   scripts/gpu.sh [BINARY] [OUT_DIR] [--steps a,b,c] [--again] [--minutes 8]
#
# BINARY (default target/release/inkling), OUT_DIR (default benches/results). Steps run by value, each within a limit of
# its own and all within --minutes; the report is written anew after each. What a step printed is kept whole in
# OUT_DIR/steps: NAME.json where it succeeded, NAME.failed.json where not, NAME.log, and a line in steps.tsv. A step
# with a NAME.json is not run again, unless --again. --steps takes names and patterns: --steps 'check,w2*'.
#
# OPERATIONS_TESTS: a built test binary, run with REQUIRE_GPU=1; PYTHON: one with torch and transformers (default
# python3). Exit codes: 0 all done, 1 a step failed or found no time, 2 usage, or no GPU.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}

usage() {
    echo "gpu.sh: $1" >&2
    sed -n '4s/^# *//p' "$0" >&2
    exit 2
}

positional=()
patterns='*'
again=false
minutes=8
while [ $# -gt 0 ]; do
    case $1 in
        --steps | --minutes)
            [ $# -ge 2 ] || usage "$1 wants a value"
            if [ "$1" = --steps ]; then patterns=$2; else minutes=$2; fi
            shift
            ;;
        --again) again=true ;;
        -*) usage "unknown option $1" ;;
        *) positional+=("$1") ;;
    esac
    shift
done
[ ${#positional[@]} -le 2 ] || usage "too many arguments"
[[ $minutes =~ ^[0-9]+$ ]] || usage "--minutes wants a whole number, not $minutes"
IFS=, read -ra patterns <<< "$patterns"

binary=${positional[0]:-$root/target/release/inkling}
out=${positional[1]:-$root/benches/results}
steps=$out/steps
peers=$root/benches/peers

# ---- running a step

# record NAME STATUS EXIT SECONDS WORDS...: a line of steps.tsv, without this machine's paths, and one to read.
record() {
    local name=$1 status=$2 code=$3 seconds=$4 words=${*:5}
    words=${words//$binary/inkling}
    words=${words//$root\//}
    words=${words//$python/python3}
    [ -z "${OPERATIONS_TESTS:-}" ] || words=${words//$OPERATIONS_TESTS/\$OPERATIONS_TESTS}
    printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$name" "$status" "$code" "$seconds" "$(date -u +%FT%TZ)" "$words" \
        >> "$steps/steps.tsv"
    printf '%-20s %-8s %4s s  %s\n' "$name" "$status" "$seconds" "$words"
    case $status in failed | late) bad=1 ;; esac
}

matches() {
    local name=$1 pattern
    for pattern in "${patterns[@]}"; do
        # shellcheck disable=SC2053 # a pattern is meant
        if [[ $name == $pattern ]]; then
            matched[$pattern]=1
            return 0
        fi
    done
    [ "$name" = facts ] # the report can't do without
}

# Whether a step is to run now: asked for, not there yet, and some time left (in `left`).
due() {
    matches "$1" && ! $planning || return 1
    if [ -s "$steps/$1.json" ] && ! $again; then
        printf '%-20s kept\n' "$1"
        return 1
    fi
    left=$((60 * minutes - SECONDS))
    if [ $left -lt 5 ]; then
        record "$1" late - 0 "no time left of $minutes minutes"
        return 1
    fi
    rm -f "$steps/$1".{json,failed.json,log}
}

limited() {
    timeout --kill-after=5 $(($1 < left ? $1 : left)) "${@:2}"
}

# finish NAME EXIT BEGIN COMMAND...: keeps what NAME.part holds under the name that fits.
finish() {
    local name=$1 code=$2 begin=$3 status="done" kept=$steps/$1.json
    if [ "$code" != 0 ]; then
        status=failed
        kept=$steps/$name.failed.json
        tail -n 3 "$steps/$name.log" | sed 's/^/    /'
        case $code in 124 | 137) echo "    ran past its limit, or was killed" ;; esac
    fi
    mv "$steps/$name.part" "$kept"
    record "$name" $status "$code" $((SECONDS - begin)) "${@:4}"
    report > "$steps/report.log" 2>&1
}

# step NAME LIMIT COMMAND...: of a command that prints JSON. LIMIT is in seconds.
step() {
    due "$1" || return 0
    local part=$steps/$1.part log=$steps/$1.log begin=$SECONDS code=0
    limited "$2" "${@:3}" > "$part" 2> "$log" || code=$?
    if [ $code = 0 ] && ! "$python" -m json.tool "$part" > /dev/null 2>> "$log"; then
        echo "what it printed is not JSON" >> "$log"
        code=not-json
    fi
    finish "$1" $code $begin "${@:3}"
}

# The same, of a command that prints text; its last lines are kept.
text_step() {
    due "$1" || return 0
    local part=$steps/$1.part log=$steps/$1.log begin=$SECONDS code=0
    local as_json='import json, sys; print(json.dumps({"last_lines": sys.stdin.read().splitlines()}))'
    limited "$2" "${@:3}" > "$log" 2>&1 || code=$?
    tail -n 40 "$log" | "$python" -c "$as_json" > "$part"
    finish "$1" $code $begin "${@:3}"
}

# without NAME WHY: a step that can't be had here.
without() {
    ! due "$1" || record "$1" skipped - 0 "$2"
}

report() {
    "$python" "$root/scripts/gpu_report.py" "$out"
}

# ---- the steps

llama=(--shape llama-3.1-8b --layer 20)
w2=("${llama[@]}" --start 200)
even=2048 # trials of the runs that are compared with each other: two whole batches

trials() {
    step "$1" "$2" "$binary" bench trials --device cuda --prompt-tokens 300 --new 100 --max-batch 1024 \
        --trials "$3" "${@:4}" --json
}

# Runs whose decode speeds are compared, one after the other; rounds, so that drift shows.
round() {
    trials "w2-hooks-on.$1" 60 $even "${w2[@]}"
    trials "w2-hooks-off.$1" 60 $even "${w2[@]}" --hooks off
    trials "w2-capture-one.$1" 60 $even "${w2[@]}" --capture one
    trials "w2-vectors-one.$1" 60 $even "${w2[@]}" --vectors 1
}

sanitize() {
    if command -v compute-sanitizer > /dev/null; then
        text_step "sanitizer-$1" 150 compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 \
            "$binary" check --device cuda --quick
    else
        without "sanitizer-$1" "compute-sanitizer is not installed"
    fi
}

all_steps() {
    step facts 30 "$python" "$root/scripts/gpu_report.py" --facts "$binary"
    step check 90 "$binary" check --device cuda --json
    if [ -n "${OPERATIONS_TESTS:-}" ]; then
        text_step tests 120 env REQUIRE_GPU=1 "$OPERATIONS_TESTS"
    else
        without tests "OPERATIONS_TESTS names no test binary"
    fi
    step ops 120 "$binary" bench ops --device cuda --json
    step peer-matmul 90 "$python" "$peers/torch_ops.py" matmul
    step peer-attention 60 "$python" "$peers/torch_ops.py" attention
    trials w2-early 60 512 "${w2[@]}"
    trials w2 90 4096 "${w2[@]}"
    trials w2-no-share 90 $even "${w2[@]}" --no-share
    round 1
    trials w2q 60 $even --shape qwen2.5-7b --layer 18 --start 200
    trials w2-0 60 $even "${llama[@]}" --start 0
    step w3 30 "$binary" bench single --device cuda --shape llama-3.1-8b --json
    step peer-trials 150 "$python" "$peers/transformers_trials.py" --seconds 90
    round 2
    round 3
    sanitize memcheck
    sanitize racecheck
}

declare -A matched=()
left=0
bad=0
planning=true # only sees which patterns name a step
all_steps
for pattern in "${patterns[@]}"; do
    [ -n "${matched[$pattern]:-}" ] || usage "no step is named $pattern"
done
planning=false

[ -x "$binary" ] || usage "no program at $binary"
binary=$(realpath "$binary")
if ! gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>&1) || [ -z "$gpus" ]; then
    echo "gpu.sh: no GPU here: ${gpus:-nvidia-smi lists none}" >&2
    exit 2
fi
mkdir -p "$steps" || exit 2

# Steps of different builds or GPUs don't belong into one report.
subject="$(sha256sum < "$binary" | cut -d' ' -f1) on $(head -n 1 <<< "$gpus")"
[ -s "$steps/subject" ] || echo "$subject" > "$steps/subject"
[ "$(< "$steps/subject")" = "$subject" ] || usage "$steps is of another binary or GPU: remove it, or name another folder"

# cuBLASLt, where Python's packages hold it.
libraries=$("$python" - << 'PYTHON'
import site, sysconfig
from pathlib import Path
sites = {*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib")}
found = {str(path.parent) for folder in sites for path in Path(folder).glob("nvidia/*/lib/libcublasLt.so*")}
print(":".join(sorted(found)))
PYTHON
)
[ -z "$libraries" ] || export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

all_steps
report || bad=1
exit $bad
