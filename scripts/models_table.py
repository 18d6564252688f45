"""Writes the parity table of docs/models.md: every family against Hugging Face transformers.

    python models_table.py [--inkling BINARY] [--kernels] [--update] [HF_FOLDER ...]

Of each tiny model under tests/golden/families, and of each real model's folder: captured rows, logits and greedy
continuations of `inkling`, clean and injected, against transformers in f32 on the same requests; in bf16 both
programs against that. `--kernels` adds the CUDA kernels on the processor (a build with host-kernels), `--update`
puts the table where the document has it; without, it is printed.

Needs: torch, transformers, safetensors.
"""

import argparse
import contextlib
import datetime
import io
import subprocess
import sys
import tempfile
from math import inf
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from compare import compare, is_logits
from hf_reference import Reference, read_requests, write_lines

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ROOT / "tests" / "golden" / "families"
DOCUMENT = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: scripts/models_table.py -->", "<!-- end of table -->"
MARGIN = 1e-3  # below this lead in logits two right answers may differ in the next token


class Runner:
    def __init__(self, binary, work):
        self.binary, self.work = binary, Path(work)

    def inkling(self, command, model, requests, out, *options):
        arguments = [self.binary, command, "--model", model, "--input", requests, "--out", out, *options]
        done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, arguments))}\n{done.stderr}")

    def captures(self, model, requests, *options):
        out = self.work / "captures.safetensors"
        self.inkling("forward", model, requests, out, *options)
        return out

    def tokens(self, model, requests):
        out = self.work / "generated.jsonl"
        self.inkling("generate", model, requests, out, "--dtype", "f32")
        return read_requests(out)

    def transformers_bf16(self, model, requests):
        """Transformers' own bf16 captures."""
        reference, tensors = Reference(model, "bfloat16"), {}
        for request in read_requests(requests):
            tensors |= reference.answer(request, requests.parent)[0]
        out = self.work / "bf16.safetensors"
        save_file(tensors, out)
        return out


def summary(path, want):
    """(worst row of the stream, worst row of the logits, mean KL, mean of the worst rows)."""
    with contextlib.redirect_stdout(sys.stderr):
        found = compare(path, want)
    of = lambda logits: [d for name, d in found.items() if is_logits(name) == logits]
    mean = lambda values: sum(values) / max(len(values), 1)
    return (
        max((d.row for d in of(False)), default=inf),
        max((d.row for d in of(True)), default=inf),
        mean([d.kl for d in of(True) if d.kl is not None]),
        mean([d.row for d in found.values()]),
    )


def agreement(got, want):
    """(tokens up to the first that differs with a clear lead, all tokens, requests cut short by a tie)."""
    same, total, ties = 0, 0, 0
    for ours, theirs in zip(got, want, strict=True):
        assert ours["id"] == theirs["id"]
        count = len(theirs["tokens"])
        first = next((i for i in range(count) if ours["tokens"][i] != theirs["tokens"][i]), count)
        if first < count and theirs["margins"][first] < MARGIN:
            ties, count = ties + 1, first
        same, total = same + first, total + count
    return same, total, ties


def row(runner, name, model, requests, generate, expected, generated, kernels):
    want = load_file(expected)
    stream, logits, kl, _ = summary(runner.captures(model, requests, "--dtype", "f32"), want)
    same, total, ties = agreement(runner.tokens(model, generate), generated)
    _, _, our_kl, ours = summary(runner.captures(model, requests, "--dtype", "bf16"), want)
    _, _, their_kl, theirs = summary(runner.transformers_bf16(model, requests), want)
    cells = [name, f"{stream:.1e}", f"{logits:.1e}", f"{kl:.0e}"]
    cells += [f"{same} of {total}" + (f" ({ties} near tie)" if ties else "")]
    cells += [f"{ours:.2e} / {theirs:.2e}", f"{our_kl:.1e} / {their_kl:.1e}"]
    if kernels:
        options = ("--dtype", "bf16", "--device", "host-kernels")
        _, _, kernel_kl, kernel = summary(runner.captures(model, requests, *options), want)
        cells += [f"{kernel:.2e}", f"{kernel_kl:.1e}"]
    print(" | ".join(cells), file=sys.stderr)
    return cells


def family_row(runner, folder, kernels):
    generated = read_requests(folder / "generated.jsonl")
    paths = (folder / name for name in ("requests.jsonl", "generate.jsonl", "expected.safetensors"))
    requests, generate, expected = paths
    return row(runner, folder.name, folder, requests, generate, expected, generated, kernels)


def real_row(runner, folder, kernels):
    """A real model with the demo fixture's chats, answered by transformers now."""
    source = ROOT / "tests" / "golden" / "smollm2"
    reference = Reference(folder)
    width = reference.model.config.hidden_size
    torch.manual_seed(3)
    save_file({"thought": torch.randn(width)}, runner.work / "vectors.safetensors")
    layers = reference.model.config.num_hidden_layers
    requests = []
    for request in read_requests(source / "requests.jsonl"):
        for part in request["inject"]:
            part["layer"] = min(part["layer"], layers - 1)
        for part in request["capture"]:
            if "layers" in part:
                part["layers"] = "all" if part["site"].startswith("resid") else [layers // 2]
        if not any(part["site"] == "logits" for part in request["capture"]):
            request["capture"].append({"site": "logits", "positions": "last"})
        requests.append(request)
    path = runner.work / "requests.jsonl"
    write_lines(path, requests)
    tensors, generated = {}, []
    for request in requests:
        captures, continuation = reference.answer(request, runner.work, True)
        tensors |= captures
        generated.append(continuation)
    expected = runner.work / "expected.safetensors"
    save_file(tensors, expected)
    return row(runner, folder.name, folder, path, path, expected, generated, kernels)


def table(rows, kernels):
    heads = ["model", "stream, f32", "logits, f32", "KL, f32", "greedy tokens", "bf16: ours / transformers",
             "KL, bf16: ours / transformers"]  # fmt: skip
    heads += ["bf16, kernels", "KL, kernels"] if kernels else []
    out = io.StringIO()
    print("| " + " | ".join(heads) + " |", file=out)
    print("|---" * len(heads) + "|", file=out)
    for cells in rows:
        print("| " + " | ".join(cells) + " |", file=out)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    print(f"\n{datetime.date.today()}, {versions}, {machine()}.", file=out)
    return out.getvalue()


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return name.replace("(R)", "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inkling", default=ROOT / "target" / "release" / "inkling")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("folders", nargs="*", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        runner = Runner(options.inkling, work)
        for folder in sorted(FAMILIES.iterdir()):
            rows.append(family_row(runner, folder, options.kernels))
        for folder in options.folders:
            rows.append(real_row(runner, folder, options.kernels))
    text = table(rows, options.kernels)
    if not options.update:
        print(text)
        return
    document = DOCUMENT.read_text()
    start, end = document.index(BEGIN) + len(BEGIN), document.index(END)
    DOCUMENT.write_text(document[:start] + "\n" + text + document[end:])


if __name__ == "__main__":
    main()
