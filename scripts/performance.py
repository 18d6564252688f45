"""Measures the engine and its peers side by side on this machine's processor, and writes what was found.

    python performance.py --model MODEL.gguf [--hf HF_DIR] [--python PYTHON] [--inkling BINARY] [--quick] [--again]
        [--skip llama,onednn] [--rounds 3] [--trials 256] [--minutes 120] [--out DIR] [--docs DIR]
    python performance.py --report RESULT.json [--docs DIR]

Writes benches/results/cpu/<date>-<cpu>.json, the part of docs/performance.md between its two markers, and
docs/performance.svg. HF_DIR is the same model for transformers: `gguf_to_hf.py MODEL.gguf HF_DIR` makes it. PYTHON runs
the peers. Each peer is measured if it can be; where it can't the goals say why. --skip takes transformers, bf16 (that
type of transformers' only), llama, onednn, ops, memory.

All steps are run in turn, --rounds times, every second time backwards, and medians count. Before a step the processor
must be idle, for which it is waited (--wait); what others used of it during the step is kept and reported. A peer's
step that takes longer than --long seconds is run once. A step that is already in the result file, of the same binary
and options, is not run again unless --again, so the script can be stopped and called again; --minutes stops it. --quick
only tries it, with few trials and tokens.

Needs: Linux; what the peers in benches/peers need; gcc for onednn.c.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from gpu_report import output_of, today
from performance_report import Results, slug, write

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benches" / "peers"
IDLE = 0.05  # of all cores, that others may use
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")


class Step(NamedTuple):
    name: str
    command: object  # Results -> words; of the results so far
    group: str = ""  # what --skip calls it; of peers
    missing: str = ""  # why it can't be run
    once: bool = False


# ---- the machine


def cpu_facts():
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    info = {key.strip(): value.strip() for key, _, value in lines}
    flags = info.get("flags", "").split()
    return {
        "name": info.get("model name", "unknown CPU"),
        "family": info.get("cpu family"),
        "model": info.get("model"),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
    }


def busy_seconds():
    """Of all cores since the start, whoever used them; a host that takes a core away counts too."""
    user, nice, system, _idle, _wait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wait_until_idle(most):
    """The share of all cores in use, below IDLE unless `most` seconds were not enough."""
    begin = time.monotonic()
    while True:
        before, start = busy_seconds(), time.monotonic()
        time.sleep(1)
        share = (busy_seconds() - before) / (time.monotonic() - start) / os.cpu_count()
        if share < IDLE or time.monotonic() - begin > most:
            return share


# ---- running a step


def child(command, limit):
    """Runs a command: what it printed and used."""
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        before, start = busy_seconds(), time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment)
        late = False
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            if time.monotonic() - start > limit and not late:
                process.kill()
                late = True
            time.sleep(0.02)
        seconds, busy = time.monotonic() - start, busy_seconds() - before
        _, status, usage = ended
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), errors.seek(0)
        own = usage.ru_utime + usage.ru_stime
        used = {
            "seconds": round(seconds, 2),
            "others": round(max(busy - own, 0) / seconds / os.cpu_count(), 3),
            "peak_bytes": usage.ru_maxrss * 1024,
        }
        said = errors.read().decode(errors="replace")
        return process.returncode, out.read().decode(errors="replace"), reason(said, limit if late else 0), used


def reason(said, limit):
    """Why a command failed, from its standard error."""
    if limit:
        return f"took longer than {limit:.0f} s"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if "error" in line.lower()]
    return (named or lines or ["it said nothing"])[-1][:200]


def record(step, words, options):
    """One run of a step, without this machine's paths."""
    idle = wait_until_idle(options.wait)
    code, printed, why, used = child(words, options.limit)
    run = {"finished": time.strftime("%FT%TZ", time.gmtime()), "busy_before": round(idle, 3)} | used
    try:
        output = json.loads(printed) if code == 0 else None
    except ValueError:
        output, why = None, "what it printed is not JSON"
    command = " ".join(str(word) for word in words)
    run |= {"command": options.plain(command)}
    return run | ({"output": output} if output else {"failed": options.plain(why)})


# ---- the steps


def w1(options, trials, *more):
    inkling = (options.inkling, "bench", "trials", "--model", options.model, "--json")
    new = ("--prompt-tokens", 180, "--start", 140, "--layer", 20, "--new", options.new)
    return lambda _: (*inkling, *new, "--trials", trials, *more)


def transformers(options, dtype):
    """The first time all batches, for as long as that is no waste; then the best."""

    def command(results):
        found = [run["output"]["batch"] for run in results.runs(f"transformers-{dtype}")]
        batches = found[0] if found else options.batches
        shape = ("--prompt-tokens", 180, "--start", 140, "--layer", 20, "--new", options.new)
        peer = (options.python, PEERS / "transformers_trials.py", "--model", options.hf, "--device", "cpu")
        return (*peer, "--dtype", dtype, *shape, "--batches", batches, "--threads", os.cpu_count(), "--seconds", 150)

    missing = "" if options.hf else "no --hf folder"
    return Step(f"transformers-{dtype}", command, "transformers", missing)


def llama(options, what, *more):
    """The first time all types and batches; then the best."""

    def command(results):
        peer = (options.python, PEERS / "llama_decode.py", what, options.model, "--folder", options.work)
        found = [run["output"]["best"] for run in results.runs(f"llama-{what}")]
        best = ("--types", found[0]["type"], "--batches", found[0].get("batch", 1)) if found else ()
        return (*peer, "--threads", os.cpu_count(), *more, *best)

    return Step(f"llama-{what}", command, "llama")


def onednn(options):
    """oneDNN's own choice of type: bf16 only where the processor multiplies it."""
    binary = options.work / "onednn"
    build = ("gcc", "-O2", "-fopenmp", PEERS / "onednn.c", "-o", binary, "-ldnnl", "-lm")
    missing = ""
    if "onednn" not in options.skip:
        try:
            code, _, why, _ = child(build, 60)
            missing = f"onednn.c does not build: {options.plain(why)}" if code else ""
        except OSError as error:
            missing = f"onednn.c does not build: {error}"
    dtype = "bf16" if {"avx512_bf16", "amx_bf16"} & set(cpu_facts()["flags"]) else "f32"
    return Step("onednn", lambda _: (binary, dtype, 0.05 if options.quick else 0.4), "onednn", missing)


def steps_of(options):
    trials = options.trials
    batched = ("--batches", "8", "--new", 8) if options.quick else ("--batches", "16,32,64")
    single = ("--prompt-tokens", 64, "--new", 16 if options.quick else 128)
    inkling = (options.inkling, "bench")
    return [
        transformers(options, "bf16"),
        transformers(options, "f32"),
        Step("w1-no-share", w1(options, 2 * trials, "--no-share")),
        Step("w1", w1(options, trials)),
        Step("w1-vectors-one", w1(options, trials, "--vectors", 1)),
        Step("w1-hooks-off", w1(options, trials, "--hooks", "off")),
        Step("w1-capture-one", w1(options, trials, "--capture", "one")),
        Step("w1-capture-all", w1(options, trials, "--capture", "all")),
        llama(options, "batched", *batched),
        Step("w3", lambda _: (*inkling, "single", "--model", options.model, *single, "--json")),
        llama(options, "single", *single),
        Step("ops", lambda _: (*inkling, "ops", "--shape", "smollm2-135m", "--json"), "ops"),
        onednn(options),
        Step("w1-many", w1(options, 16 * trials), "memory", once=True),
    ]


def run_all(options, results, save):
    steps = steps_of(options)
    begin = time.monotonic()
    for number in range(1, options.rounds + 1):
        for step in steps if number % 2 else reversed(steps):
            if {step.group, step.name.rpartition("-")[2]} & set(options.skip):
                results.failed[step.name] = "left out"
            elif step.missing:
                results.failed[step.name] = step.missing
            elif not due(step, number, options, results):
                continue
            elif time.monotonic() - begin > 60 * options.minutes:
                print(f"{step.name} {number}: no time left of {options.minutes} minutes", file=sys.stderr)
            else:
                words = [str(word) for word in step.command(results)]
                run = record(step, words, options)
                results.add(step.name, number, run)
                said = run.get("failed") or f"others {100 * run['others']:.0f} %"
                print(f"{step.name:20} {number} {run['seconds']:7.1f} s  {said}", file=sys.stderr, flush=True)
                save()


def due(step, number, options, results):
    if results.has(step.name, number) or step.name in results.failed:
        return False
    took = [run["seconds"] for run in results.runs(step.name)]
    is_long = bool(step.group) and bool(took) and max(took) > options.long
    return not took or not (step.once or is_long)


# ---- the options


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="GGUF")
    parser.add_argument("--hf", type=Path, metavar="DIR", help="the same model for transformers")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="one that has the peers")
    parser.add_argument("--inkling", type=Path, default=ROOT / "target/release/inkling", metavar="PATH")
    parser.add_argument("--skip", default=[], type=lambda text: text.split(","), metavar="A,B")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--batches", help="of transformers")
    parser.add_argument("--wait", type=float, help="most seconds for the processor to become idle")
    parser.add_argument("--long", type=float, default=300, metavar="SECONDS")
    parser.add_argument("--limit", type=float, default=2400, metavar="SECONDS", help="of one step")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--out", type=Path, default=ROOT / "benches/results/cpu")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--report", type=Path, metavar="RESULT.json", help="only write the page anew")
    options = parser.parse_args()
    quick = options.quick
    options.rounds = options.rounds or (1 if quick else 3)
    options.trials = options.trials or (16 if quick else 256)
    options.batches = options.batches or ("4" if quick else "32,64,96")
    options.wait = (0 if quick else 60) if options.wait is None else options.wait
    options.new = 8 if quick else 60
    if not options.report:
        if not (options.model and options.model.is_file()):
            parser.error("--model MODEL.gguf is needed")
        if not os.access(options.inkling, os.X_OK):
            parser.error(f"no program at {options.inkling}")
        options.inkling = options.inkling.resolve()
    return options


def plainer(options):
    """Takes this machine's paths out of a text."""
    paths = {
        options.work: "WORK",
        options.inkling: "inkling",
        options.model: options.model.name,
        options.python: "python3",
        options.hf: "HF_DIR",
        Path.home(): "~",
    }
    names = {str(path): word for path, word in paths.items() if path}

    def plain(text):
        for path in sorted(names, key=len, reverse=True):
            text = text.replace(path, names[path])
        return text.replace(f"{ROOT}/", "")

    return plain


def main():
    options = arguments()
    if options.report:
        print(write(Results(json.loads(options.report.read_text())), options.docs))
        return
    facts = {
        "date": today(),
        "cpu": cpu_facts(),
        "inkling": output_of(options.inkling, "--version").removeprefix("inkling "),
        "sha256": hashlib.sha256(options.inkling.read_bytes()).hexdigest(),
        "model": options.model.name,
        "quick": options.quick,
        "trials": options.trials,
        "new": options.new,
    }
    path = options.out / f"{facts['date']}-{slug(facts['cpu']['name'])}{'-quick' if options.quick else ''}.json"
    results = Results({"facts": facts, "runs": []})
    if path.exists() and not options.again:
        before = json.loads(path.read_text())
        if before["facts"] == facts:
            results = Results({"facts": facts, "runs": [run for run in before["runs"] if "output" in run]})

    def save():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results.whole(), indent=1) + "\n")

    with tempfile.TemporaryDirectory() as work:
        options.work = Path(work)
        options.plain = plainer(options)
        run_all(options, results, save)
    save()
    print(write(results, options.docs), path, sep="\n\n")


if __name__ == "__main__":
    main()
