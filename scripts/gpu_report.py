"""Merges the steps of gpu.sh into one JSON file and one page: the goals with what was measured, and the numbers.

    python gpu_report.py OUT_DIR            reads OUT_DIR/steps, writes OUT_DIR/<date>-<gpu>.json and .md, prints goals
    python gpu_report.py --facts BINARY     prints what the machine and the binary are, as JSON

A goal whose numbers are not all there is "not measured", with what is missing. Means are geometric.
"""

import argparse
import csv
import hashlib
import json
import platform
import re
import subprocess
import time
from math import exp, isfinite, log
from pathlib import Path
from statistics import median
from typing import NamedTuple

GPU_FACTS = (
    "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,"
    "power.limit,temperature.gpu,utilization.gpu"
)
RUN_KEYS = ("status", "exit", "seconds", "finished", "command")  # of steps.tsv, after the name


class Missing(Exception):
    """A number that a goal needs is not there."""


class Goal(NamedTuple):
    id: str
    what: str
    measure: object  # Steps -> (value, note); raises Missing
    good: float  # what passes
    aim: float
    at_most: bool = False  # small values are the good ones
    gpu: str = ""  # the limit is for this GPU only


# ---- reading


def number(record, key, whose):
    value = record.get(key) if isinstance(record, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value) or value <= 0:
        raise Missing(f"{whose} has no {key}")
    return value


def mean(values):
    return exp(sum(map(log, values)) / len(values))


class Steps:
    """What the steps printed, and how they went."""

    def __init__(self, folder):
        self.outputs = {path.stem: read_json(path) for path in folder.glob("*.json") if ".failed" not in path.name}
        self.failed = {path.name.removesuffix(".failed.json"): path for path in folder.glob("*.failed.json")}
        self.folder = folder
        self.runs = {}  # name: the last line about it
        if not (folder / "steps.tsv").exists():
            raise SystemExit(f"{folder} has no steps.tsv: gpu.sh writes it")
        with (folder / "steps.tsv").open(newline="") as lines:
            for line in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
                self.runs[line[0]] = dict(zip(RUN_KEYS, line[1:], strict=True))

    def __getitem__(self, name):
        if not isinstance(self.outputs.get(name), dict):
            raise Missing(f"no {name}")
        return self.outputs[name]

    def number(self, name, key):
        return number(self[name], key, name)

    def log(self, name):
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace").splitlines()[-20:] if path.exists() else []

    def peer(self, name):
        """What a peer printed, if it was the same model on the same GPU."""
        found, gpu = self[name], self["facts"].get("gpu", {}).get("name")
        if (found.get("device"), found.get("shape")) != (gpu, "llama-3.1-8b"):
            raise Missing(f"{name} timed {found.get('shape')} on {found.get('device')}")
        return found

    def rounds(self, name):
        """{round: output} of a run that is repeated."""
        found = {key.rpartition(".")[2]: self[key] for key in self.outputs if key.startswith(f"{name}.")}
        if not found:
            raise Missing(f"no {name}")
        return found

    def ops(self, *names, rows=lambda rows: True, words=()):
        """Results of `bench ops` by operation, rows and words of their shape."""
        found = [
            result
            for result in self["ops"].get("results", [])
            if result.get("op") in names
            and rows(result.get("rows") or 0)
            and all(word in str(result.get("shape", "")).lower() for word in words)
        ]
        if not found:
            raise Missing(f"ops has no {' or '.join(names)} {' '.join(words)}".rstrip() + " of these rows")
        return found

    def share_of_copy(self, result):
        """Bytes per second of a result, of what a copy reaches."""
        ceiling = number(self["ops"].get("ceilings"), "copy_bytes_per_s", "ops' ceilings")
        return number(result, "bytes", result["op"]) / number(result, "seconds", result["op"]) / ceiling


def read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


# ---- the goals


def flops(result):
    if "flops" in result:
        return number(result, "flops", "a matmul")
    return 2 * number(result, "rows", "a matmul") * number(result, "n", "a matmul") * number(result, "k", "a matmul")


def name_of(result):
    return f"{str(result.get('shape', '')).split(' ')[0]}×{result.get('rows')}"


def matmul_against_torch(steps):
    wanted = {256, 512, 1024, 2048}
    ours = steps.ops("matmul", "gated_matmul", rows=wanted.__contains__)
    theirs = [peer for peer in steps.peer("peer-matmul").get("results", []) if peer.get("rows") in wanted]
    ratios = {}
    for peer in theirs:
        for result in ours:
            # The same product, whatever it is called: as many operations for as many rows.
            if result["rows"] == peer["rows"] and abs(flops(result) / flops(peer) - 1) < 0.01:
                ratios[name_of(peer)] = number(peer, "seconds", "peer") / number(result, "seconds", "ops")
    if not ratios:
        raise Missing("ops and peer-matmul share no shape")
    worst = min(ratios, key=ratios.get)
    return mean(ratios.values()), f"{len(ratios)} of {len(theirs)} products, worst {worst} {ratios[worst]:.2f}"


def small_matmul(steps):
    ceiling = number(steps["ops"].get("ceilings"), "copy_bytes_per_s", "ops' ceilings")
    shares = {}
    for result in steps.ops("matmul", "gated_matmul", rows=lambda rows: 1 <= rows <= 64):
        weight_bytes = 2 * flops(result) / (2 * result["rows"])
        shares[name_of(result)] = weight_bytes / number(result, "seconds", "ops") / ceiling
    worst = min(shares, key=shares.get)
    return mean(shares.values()), f"{len(shares)} products, worst {worst} {shares[worst]:.2f}"


def decode_attention(steps):
    found = steps.ops("attention_decode")
    shares = [steps.share_of_copy(result) for result in found]
    most = max(range(len(found)), key=lambda i: found[i]["bytes"])
    return shares[most], f"the case with most bytes, {name_of(found[most])}; all {min(shares):.2f} to {max(shares):.2f}"


def prefix_attention(steps):
    ours = steps.ops("attention_prefix", rows=lambda rows: rows == 1024)
    named = [result for result in ours if {"300", "50"} <= set(re.findall(r"\d+", str(result.get("shape"))))]
    if not named:
        raise Missing("ops names no attention_prefix of 300 shared and 50 own")
    ratio = number(steps.peer("peer-attention"), "best", "peer-attention") / number(named[0], "seconds", "ops")
    return ratio, "the fastest of torch's ways"


def residual_norm(steps):
    found = steps.ops("residual_norm", rows=lambda rows: rows >= 16000, words=("inject", "capture"))
    return steps.share_of_copy(found[0]), str(found[0].get("shape"))


def head_and_sample(steps):
    alone = {result["rows"]: result for result in steps.ops("matmul", words=("head",))}
    both = {result["rows"]: result for result in steps.ops("head_sample")}
    common = sorted(alone.keys() & both.keys())
    if not common:
        raise Missing("head and head_sample have no rows in common")
    ratios = [number(both[rows], "seconds", "ops") / number(alone[rows], "seconds", "ops") for rows in common]
    return ratios[-1], f"{common[-1]} rows; all {min(ratios):.3f} to {max(ratios):.3f}"


def step_overhead(name):
    def measure(steps):
        wall, device = steps.number(name, "decode_s"), steps.number(name, "decode_device_s")
        return wall / device, "the device's time includes what lies between the kernels of a recorded step"

    return measure


def against_transformers(steps):
    peer = steps.peer("peer-trials")
    ratio = steps.number("w2", "trials_per_s") / number(peer, "trials_per_s", "peer-trials")
    return ratio, f"transformers {peer['trials_per_s']:.1f} trials/s at batch {peer.get('batch')}"


def against_no_share(steps):
    shared = median(number(run, "trials_per_s", "w2-hooks-on") for run in steps.rounds("w2-hooks-on").values())
    return shared / steps.number("w2-no-share", "trials_per_s"), ""


def share_of_peak(steps):
    return steps.number("w2", "flops_per_s") / steps.number("w2", "matmul_flops_per_s"), ""


def hooks_cost(steps):
    runs, bases = steps.rounds("w2-capture-one"), steps.rounds("w2-hooks-off")

    def seconds(record):  # per trial
        return number(record, "decode_s", "a round") / number(record, "trials", "a round")

    ratios = [seconds(bases[key]) / seconds(runs[key]) for key in runs.keys() & bases.keys()]
    if not ratios:
        raise Missing("no round has both w2-capture-one and w2-hooks-off")
    return median(ratios), f"{len(ratios)} rounds, {min(ratios):.3f} to {max(ratios):.3f}"


GOALS = [
    Goal("K1", "matmul ÷ torch.matmul", matmul_against_torch, 0.90, 1.00),
    Goal("K2", "matmul of 1 to 64 rows: weight bytes per second ÷ copy", small_matmul, 0.80, 0.90),
    Goal("K3", "decode attention: KV bytes per second ÷ copy", decode_attention, 0.80, 0.90),
    Goal("K4", "shared-prefix attention ÷ torch's over expanded KV", prefix_attention, 3, 4),
    Goal("K5", "residual_norm, all rows injected and captured: bytes per second ÷ copy", residual_norm, 0.90, 0.95),
    Goal("K6", "output head and sampling ÷ output head", head_and_sample, 1.05, 1.02, at_most=True),
    Goal("K7, 1", "decode steps, wall ÷ device, 1 row", step_overhead("w3"), 1.15, 1.08, at_most=True),
    Goal("K7, 1024", "decode steps, wall ÷ device, W2", step_overhead("w2"), 1.03, 1.01, at_most=True),
    Goal("E1", "W2, trials/s", lambda steps: (steps.number("w2", "trials_per_s"), ""), 200, 280, gpu="H100"),
    Goal("E2", "W2 ÷ transformers and a hook", against_transformers, 12, 20),
    Goal("E3", "W2 ÷ nothing shared", against_no_share, 2.2, 2.7),
    Goal("E4", "W2 matmul operations per second ÷ the matmul peak", share_of_peak, 0.50, 0.70),
    Goal("E5", "W2 decode, with injections and captures ÷ without", hooks_cost, 0.98, 0.99),
]


def judge(goal, steps, gpu):
    row = {"id": goal.id, "what": goal.what, "pass": goal.good, "aim": goal.aim, "value": None}
    try:
        row["value"], row["note"] = goal.measure(steps)
    except Missing as missing:
        return row | {"verdict": "not measured", "note": str(missing)}
    sign = -1 if goal.at_most else 1
    reached = [sign * row["value"] >= sign * limit for limit in (goal.good, goal.aim)]
    row["verdict"] = "aim" if reached[1] else "pass" if reached[0] else "missed"
    if goal.gpu not in gpu:
        row["verdict"] = f"for {goal.gpu} only"
    return row


# ---- the page


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def cell(record, key, scale=1.0, form=".4g"):
    value = record.get(key)
    return format(value * scale, form) if isinstance(value, (int, float)) else ""


def goals_table(goals):
    shown = [{**row, "value": "" if row["value"] is None else f"{row['value']:.4g}"} for row in goals]
    keys = ("id", "what", "value", "pass", "aim", "verdict", "note")
    return table(("", "goal", "value", "pass", "aim", "verdict", ""), [[row[key] for key in keys] for row in shown])


def runs_table(steps):
    keys = ("trials", "trials_per_s", "new_tokens_per_s", "tokens_per_s", "prompt_s", "decode_s", "wall_s", "rows")
    outputs = {name: out for name, out in steps.outputs.items() if isinstance(out, dict)}
    runs = {name: out for name, out in sorted(outputs.items()) if out.keys() & {"trials_per_s", "tokens_per_s"}}
    return table(("run", *keys), [[name, *(cell(out, key) for key in keys)] for name, out in runs.items()])


def ops_table(steps):
    rows = []
    for source in ("ops", "peer-matmul", "peer-attention"):
        for result in (steps.outputs.get(source) or {}).get("results", []):
            who = "inkling" if source == "ops" else "torch"
            kind, shape, count = (result.get(key, "") for key in ("op", "shape", "rows"))
            micros, share = cell(result, "seconds", 1e6), cell(result, "share", form=".2f")
            rows.append((kind, shape, count, who, micros, cell(result, "spread", form=".2f"), share))
    rows.sort(key=lambda row: (row[0].removeprefix("gated_"), str(row[1]).split(" ")[0], int(row[2] or 0), row[3]))
    return table(("operation", "shape", "rows", "", "µs", "spread", "share of ceiling"), rows)


def check_line(steps):
    """Whether the build computes the right thing; without that no timing means anything."""
    if "check" in steps.outputs:
        results = steps["check"].get("results", [])
        return f"`inkling check`: all {len(results)} within tolerance."
    failed = read_json(steps.failed["check"]) if "check" in steps.failed else None
    if "check" not in steps.failed:
        return "**`inkling check` was not run: nothing here says that the results are right.**"
    names = [str(result.get("name")) for result in (failed or {}).get("results", []) if not result.get("ok")]
    return f"**`inkling check` failed: the numbers are those of a wrong build.** {', '.join(names)}".rstrip()


def page(title, facts, steps, goals):
    gpu = facts.get("gpu", {})
    versions = [f"{key} {facts[key]}" for key in ("inkling", "sha256") if facts.get(key)]
    for name in ("peer-matmul", "peer-trials"):
        out = steps.outputs.get(name) or {}
        versions += [f"{key} {out[key]}" for key in ("torch", "transformers") if key in out]
    ceilings = [
        f"{who}: copy {cell(found, 'copy_bytes_per_s', 1e-12)} TB/s, "
        f"matmul {cell(found, 'matmul_flops_per_s', 1e-12)} TFLOP/s"
        for who, step in (("inkling", "ops"), ("torch", "peer-matmul"))
        if (found := (steps.outputs.get(step) or {}).get("ceilings"))
    ]
    parts = [
        f"# {title}",
        "; ".join(dict.fromkeys(versions)),
        "; ".join(f"{key} {value}" for key, value in gpu.items()),
        check_line(steps),
        "## Goals",
        goals_table(goals),
        "## Runs",
        runs_table(steps),
        "## Operations",
        "Ceilings, " + "; ".join(ceilings) if ceilings else "",
        ops_table(steps),
        "## Steps",
        table(
            ("step", *RUN_KEYS),
            [[name, *(run[key] for key in RUN_KEYS)] for name, run in steps.runs.items()],
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# ---- the facts


def output_of(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def today():
    return time.strftime("%Y-%m-%d", time.gmtime())


def facts_of(binary):
    row = output_of("nvidia-smi", f"--query-gpu={GPU_FACTS}", "--format=csv,noheader").splitlines()[0]
    doctor = json.loads(output_of(binary, "doctor", "--json"))
    doctor.pop("demo_model", None)  # a path of this machine
    return {
        "date": today(),
        "gpu": dict(zip(GPU_FACTS.split(","), row.split(", "), strict=True)),
        "inkling": output_of(binary, "--version").removeprefix("inkling "),
        "sha256": hashlib.sha256(Path(binary).read_bytes()).hexdigest(),
        "kernel": platform.release(),
        "doctor": doctor,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--facts", metavar="BINARY")
    options = parser.parse_args()
    if options.facts:
        print(json.dumps(facts_of(options.facts)))
        return
    if not options.out:
        parser.error("OUT_DIR or --facts")

    steps = Steps(options.out / "steps")
    facts = steps.outputs.get("facts") or {}
    gpu = facts.get("gpu", {}).get("name", "unknown GPU")
    date = facts.get("date") or today()
    goals = [judge(goal, steps, gpu) for goal in GOALS]
    for name, run in steps.runs.items():
        run["output"] = steps.outputs.get(name)
        if name in steps.failed:
            run["output"] = read_json(steps.failed[name])
            run["last_lines"] = steps.log(name)
    merged = {"facts": facts, "goals": goals, "steps": steps.runs}
    stem = options.out / f"{date}-{re.sub('[^a-z0-9]+', '-', gpu.lower()).removeprefix('nvidia-')}"
    stem.with_name(stem.name + ".json").write_text(json.dumps(merged, indent=1) + "\n")
    stem.with_name(stem.name + ".md").write_text(page(f"inkling on {gpu}, {date}", facts, steps, goals))
    print(goals_table(goals), check_line(steps), f"{stem}.md", sep="\n\n")


if __name__ == "__main__":
    main()
