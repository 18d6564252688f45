"""Judges what performance.py measured, and writes the measured part of docs/performance.md and its picture.

A goal whose numbers are not all there is "not measured", with what is missing. Where two runs of the engine are
compared, so are those of the same round, and the median of the rounds' ratios counts; of a peer and the engine the
medians are compared. Means are geometric.
"""

import re
from statistics import median
from typing import NamedTuple
from xml.sax.saxutils import escape

from gpu_report import Missing, mean, number, table

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NOISE = 0.05  # of all cores, that others may have used during a step
RUNS = {
    "w1": "inkling",
    "w1-no-share": "inkling, nothing shared",
    "w1-hooks-off": "inkling, nothing injected",
    "transformers-bf16": "transformers, bf16",
    "transformers-f32": "transformers, f32",
}


class Goal(NamedTuple):
    id: str
    what: str
    measure: object  # Results -> (value, against what, note); raises Missing
    good: float | None  # what passes; None where there is no such limit
    aim: float | None
    at_most: bool = False  # small values are the good ones


class Results:
    """The steps' runs, by name and round."""

    def __init__(self, whole):
        self.facts = whole["facts"]
        self.all = whole["runs"]
        self.failed = whole.get("failed", {})  # step: why it has no numbers

    def whole(self):
        goals = [judge(goal, self) for goal in GOALS]
        return {"facts": self.facts, "goals": goals, "failed": self.failed, "runs": self.all}

    def add(self, name, round_, run):
        self.all.append({"name": name, "round": round_} | run)
        if "failed" in run:
            self.failed[name] = run["failed"]

    def has(self, name, round_):
        return any(run["round"] == round_ for run in self.runs(name))

    def runs(self, name):
        return [run for run in self.all if run["name"] == name and "output" in run]

    def outputs(self, name):
        """{round: what the step printed}"""
        found = {run["round"]: run["output"] for run in self.runs(name)}
        if not found:
            raise Missing(f"{name}: {self.failed.get(name, 'not run')}")
        return found

    def median(self, name, key, within=None):
        outputs = self.outputs(name).values()
        return median(number(output[within] if within else output, key, name) for output in outputs)

    def ratios(self, name, base, value):
        """Of each round that has both, the value of `name` divided by that of `base`."""
        ours, theirs = self.outputs(name), self.outputs(base)
        common = sorted(ours.keys() & theirs.keys())
        if not common:
            raise Missing(f"no round has both {name} and {base}")
        return [value(ours[key]) / value(theirs[key]) for key in common]


def trials_per_s(output):
    return number(output, "trials_per_s", "a run")


def decode_speed(output):
    return number(output, "trials", "a run") / number(output, "decode_s", "a run")


def spread(ratios):
    return f"{len(ratios)} rounds, {min(ratios):.3f} to {max(ratios):.3f}" if len(ratios) > 1 else "one round"


# ---- the goals


def against_transformers(dtype, own="w1"):
    def measure(results):
        peer = results.median(f"transformers-{dtype}", "trials_per_s")
        ours = results.median(own, "trials_per_s")
        about = next(iter(results.outputs(f"transformers-{dtype}").values()))
        name = f"transformers {about['transformers']}, torch {about['torch'].partition('+')[0]}, {dtype}"
        return ours / peer, name, f"{ours:.2f} ÷ {peer:.2f} trials/s, its batch {about['batch']}"

    return measure


def against_best_transformers(results):
    rates = {}
    for dtype in ("bf16", "f32"):  # both, or it is not known which is better
        rates[dtype] = results.median(f"transformers-{dtype}", "trials_per_s")
    return against_transformers(max(rates, key=rates.get))(results)


def against_own(name, base, value):
    def measure(results):
        ratios = results.ratios(name, base, value)
        return median(ratios), f"`{base}`", spread(ratios)

    return measure


def llama_name(results, step):
    about = next(iter(results.outputs(step).values()))
    best = about["best"]
    batch = f", batch {best['batch']}" if "batch" in best else ""
    return f"llama.cpp (llama-cpp-python {about['llama_cpp_python']}), {best['type']}{batch}"


def against_llama(step, ours):
    def measure(results):
        peer = results.median(step, "tokens_per_s", "best")
        own = results.median(ours, "new_tokens_per_s")
        return own / peer, llama_name(results, step), f"{own:.1f} ÷ {peer:.1f} tokens/s"

    return measure


def products(results, step):
    """{(name, rows): operations per second}, medians over the rounds."""
    found = {}
    for output in results.outputs(step).values():
        for result in output["results"]:
            if result.get("op", "matmul") in ("matmul", "gated_matmul"):
                rate = number(result, "flops", step) / number(result, "seconds", step)
                found.setdefault((result["shape"], result["rows"], result["n"], result["k"]), []).append(rate)
    return {key: median(rates) for key, rates in found.items()}


def against_onednn(results):
    theirs, ours = products(results, "onednn"), products(results, "ops")
    if lacking := theirs.keys() - ours.keys():
        raise Missing(f"ops has no {' or '.join(f'{name}×{rows}' for name, rows, *_ in sorted(lacking)[:3])}")
    ratios = {key: ours[key] / theirs[key] for key in theirs}
    worst = min(ratios, key=ratios.get)
    about = next(iter(results.outputs("onednn").values()))
    kernels = sorted({result["kernel"] for result in about["results"]})
    name = f"oneDNN {about['onednn']}, {about['dtype']} ({', '.join(kernels)})"
    note = f"{len(ratios)} products, worst {worst[0]}×{worst[1]} {ratios[worst]:.2f}, best {max(ratios.values()):.2f}"
    return mean(ratios.values()), name, note


def memory(results):
    def peak(name):
        return median(run["peak_bytes"] for run in results.runs(name))

    many, few = (next(iter(results.outputs(name).values()))["trials"] for name in ("w1-many", "w1"))
    note = f"{peak('w1-many') / 2**20:.0f} ÷ {peak('w1') / 2**20:.0f} MiB, {many:,} ÷ {few:,} trials"
    return peak("w1-many") / peak("w1"), "`w1`", note


def host_share(results):
    shares = [1 - number(out, "device_s", "w1") / number(out, "wall_s", "w1") for out in results.outputs("w1").values()]
    return median(shares), "the run's own wall time", "planning and handing out, not in steps"


GOALS = [
    Goal("C1", "W1 trials/s ÷ transformers and a hook, bf16", against_transformers("bf16"), 8, 14),
    Goal("C1, better type", "the same ÷ its faster type here", against_best_transformers, None, None),
    Goal("C2", "W1 ÷ nothing shared", against_own("w1", "w1-no-share", trials_per_s), 1.4, 1.8),
    Goal("C2, alone", "nothing shared ÷ transformers", against_transformers("bf16", "w1-no-share"), 4, None),
    Goal("C3", "W1 tokens/s ÷ llama.cpp, batched, no injections", against_llama("llama-batched", "w1"), 6, 9),
    Goal("C4", "W3 ÷ llama.cpp, single stream", against_llama("llama-single", "w3"), 1.3, 1.6),
    Goal("C5", "matmul ÷ oneDNN", against_onednn, 0.9, 1.1),
    Goal("C6, one", "W1 decode ÷ one vector for all", against_own("w1", "w1-vectors-one", decode_speed), 0.97, 0.99),
    Goal("C6, none", "W1 decode ÷ nothing injected", against_own("w1", "w1-hooks-off", decode_speed), 0.97, 0.99),
    Goal("C7, one", "W1, one block captured ÷ none", against_own("w1-capture-one", "w1", trials_per_s), 0.95, 0.98),
    Goal("C7, all", "W1, all blocks captured ÷ none", against_own("w1-capture-all", "w1", trials_per_s), 0.85, 0.92),
    Goal("memory", "W1 peak memory, many trials ÷ few", memory, 1.10, None, at_most=True),
    Goal("host", "W1, share of the time that is the host's", host_share, 0.05, None, at_most=True),
]


def judge(goal, results):
    row = {"id": goal.id, "what": goal.what, "pass": goal.good, "aim": goal.aim, "value": None, "against": ""}
    try:
        row["value"], row["against"], row["note"] = goal.measure(results)
    except Missing as missing:
        return row | {"verdict": "not measured", "note": str(missing)}
    sign = -1 if goal.at_most else 1
    reached = [limit is not None and sign * row["value"] >= sign * limit for limit in (goal.good, goal.aim)]
    if goal.good is None:
        return row | {"verdict": "no goal"}
    verdict = "aim" if reached[1] else "pass" if reached[0] else "missed"
    return row | {"verdict": "quick try" if results.facts["quick"] else verdict}


# ---- the page


def goals_table(results):
    lines = []
    for goal in GOALS:
        row = judge(goal, results)
        sign = "≤" if goal.at_most else "≥"
        good, aim = ("" if limit is None else f"{sign} {limit}" for limit in (goal.good, goal.aim))
        value = "" if row["value"] is None else f"{row['value']:.3g}"
        lines.append((row["id"], row["what"], good, aim, value, row["verdict"], row["against"], row["note"]))
    return table(("", "goal", "pass", "aim", "measured", "", "against", ""), lines)


def rates(results):
    """[(name, trials/s)] of W1."""
    found = []
    for step, name in RUNS.items():
        try:
            found.append((name, results.median(step, "trials_per_s")))
        except Missing:
            continue
    return found


def runs_table(results):
    keys = {
        "trials/s": ("trials_per_s", "{:.3g}"),
        "tokens/s": ("new_tokens_per_s", "{:.4g}"),
        "steps with prompts, s": ("prompt_s", "{:.2f}"),
        "decode steps, s": ("decode_s", "{:.2f}"),
        "matmul GFLOP/s": ("flops_per_s", "{:.1f}"),
        "of the widest product's": ("share_of_ceiling", "{:.2f}"),
    }
    lines = []
    for step in sorted({run["name"] for run in results.all if run["name"].startswith("w")}):
        cells = []
        for key, form in keys.values():
            try:
                cells.append(form.format(results.median(step, key) / (1e9 if key == "flops_per_s" else 1)))
            except Missing:
                cells.append("")
        lines.append((f"`{step}`", *cells))
    return table(("run", *keys), lines)


def picture(bars, title):
    """Horizontal bars as SVG, readable on light and dark pages."""
    left, width, height = 190, 400, 26
    most = max(value for _, value in bars)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 70}" height="{40 + height * len(bars)}" '
        'font-family="sans-serif" font-size="13">',
        "<style>text { fill: #333 } @media (prefers-color-scheme: dark) { text { fill: #ccc } }</style>",
        f'<text x="8" y="20">{escape(title)}</text>',
    ]
    for row, (name, value) in enumerate(bars):
        top, length = 34 + height * row, max(width * value / most, 1)
        color = "#4878a8" if name.startswith("inkling") else "#a0a0a0"
        parts += [
            f'<text x="{left - 8}" y="{top + 13}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{left}" y="{top}" width="{length:.1f}" height="18" fill="{color}"/>',
            f'<text x="{left + length + 6:.1f}" y="{top + 13}">{value:.3g}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def machine(cpu):
    kind = f"{cpu['name']} (family {cpu['family']}, model {cpu['model']}; {', '.join(cpu['flags'])})"
    return f"{kind}, {cpu['cores']} cores, {cpu['memory_gib']} GiB"


def noise(results):
    shares = [run["others"] for run in results.all if "output" in run]
    if not shares:
        return ""
    loud = max(shares) > NOISE
    said = f"Others used {median(shares):.0%} of the processor during the steps, {max(shares):.0%} at most."
    return f"**The machine was not idle: these numbers are no evidence.** {said}" if loud else said


def measured(results):
    facts = results.facts
    about = f"{facts['date']}, {machine(facts['cpu'])}; inkling {facts['inkling']}, {facts['model']} in bf16"
    arithmetic = {out["arithmetic"] for run in results.runs("w1") if (out := run["output"]).get("arithmetic")}
    parts = [
        f"{about}; {', '.join(sorted(arithmetic)) or 'arithmetic unknown'}; {facts['trials']} trials a run.",
        "**A quick try with few trials and tokens, only to see that the script works: no evidence.**"
        if facts["quick"]
        else "",
        noise(results),
        goals_table(results),
        "![Trials per second of W1](performance.svg)" if rates(results) else "",
        runs_table(results),
    ]
    return "\n\n".join(part for part in parts if part)


def slug(name):
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def write(results, docs):
    """Puts the measured part into the page; returns the table of goals."""
    page = docs / "performance.md"
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} has no {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{measured(results)}\n\n{END}{after}")
    if bars := rates(results):
        facts = results.facts
        title = f"W1, trials per second, {facts['cpu']['name']}, {facts['date']}"
        (docs / "performance.svg").write_text(picture(bars, title + (" (quick try)" if facts["quick"] else "")))
    return goals_table(results)
