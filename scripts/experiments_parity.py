"""Compares trials of thought-vs-text, prefill and intentional-control with transformers and forward hooks.

    python3 scripts/experiments_parity.py --inkling BINARY --model MODEL --hf FOLDER [--count N]

Runs a few words of each protocol in f32 (prefill's replies as readouts, so that there are logits to compare),
then computes every trial anew from the manifest's tokens and the folder's vectors: the vector is added at the
window's positions of one block, once, in one pass over the prompt. Compared are the five likeliest tokens with
their log-probabilities, the KL divergence from the clean prompt, the receipt's norms, and a probe's cosines
and projections at every layer and token. Ends with 1 where something is off by more than is said below.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Two f32 implementations of 30 blocks: the worst seen on the demo model are 3e-5, 3e-5, 4e-7 and 7e-7.
LOGPROB, KL, NORM, COSINE = 2e-4, 2e-4, 1e-5, 1e-5


class Reference:
    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.clean = {}

    @torch.no_grad()
    def run(self, tokens, layer=None, change=None, span=None):
        """Logits of the last token, and the stream after each block, (layers, tokens, dim)."""
        streams = []

        def hook(index):
            def after(_module, _inputs, output):
                hidden = output[0] if isinstance(output, tuple) else output
                if index == layer:
                    hidden[:, span[0] : span[1]] += change
                streams.append(hidden[0].clone())
                return output
            return after

        blocks = self.model.model.layers
        handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(blocks)]
        logits = self.model(torch.tensor([tokens])).logits[0, -1]
        for handle in handles:
            handle.remove()
        return logits.log_softmax(-1), torch.stack(streams)

    def of_clean(self, tokens):
        key = tuple(tokens)
        if key not in self.clean:
            self.clean[key] = self.run(tokens)
        return self.clean[key]


class Worst(dict):
    def note(self, what, off, limit, where):
        if off > self.get(what, (-1,))[0]:
            self[what] = (off, limit, where)


def prompt_of(manifest, trial):
    word, sentence, name = trial["concept"], trial.get("sentence", ""), trial["prompt"]
    names = [f"{name} ({word} | {sentence})", f"{name} ({sentence})", f"{name} ({word})", name]
    return next(p for n in names for p in manifest["prompts"] if p["name"] == n)


def compare(reference, folder, worst):
    manifest = json.loads((folder / "manifest.json").read_text())
    vectors = load_file(folder / "vectors.safetensors")
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    layers = sorted({t["layer"] for t in trials if t["layer"] is not None})
    if not layers:
        layers = list(range(manifest["model"]["layers"]))
    controls = {}
    done = 0
    for trial in trials:
        prompt = prompt_of(manifest, trial)
        where = f"{trial['part']}, {trial['prompt']}, {trial['concept']}, {trial['condition']}, {trial['layer']}"
        if trial.get("probe"):
            compare_probe(reference, trial, prompt, vectors, layers, worst, where)
            done += 1
            continue
        if trial.get("next") is None or trial["condition"] in ("random", "clean"):
            continue
        span = prompt["after"] if trial["condition"] == "after" else (prompt["from"], prompt["to"])
        clean, streams = reference.of_clean(prompt["tokens"])
        layer = trial["layer"]
        window = streams[layer, max(span[0], 1) : span[1]]
        scale = window.norm(dim=-1).mean()
        rows = vectors[trial.get("other") or trial["concept"]]
        vector = rows if rows.dim() == 1 else rows[layers.index(layer)]
        change = trial["dose"] * scale * vector / vector.norm()
        receipt = trial["receipts"][0]
        worst.note("norm", abs(receipt["planned"] / change.norm().item() - 1), NORM, where)
        if receipt["rows_touched"] != span[1] - span[0]:
            worst.note("rows", abs(receipt["rows_touched"] - (span[1] - span[0])), 0, where)
        got, _ = reference.run(prompt["tokens"], layer, change, span)
        for piece, logprob in trial["next"]["top"]:
            ids = controls.setdefault(piece, [
                i for i in range(got.numel()) if reference.tokenizer.decode([i]) == piece
            ])
            off = min((abs(got[i].item() - logprob) for i in ids), default=9.0)
            worst.note("logprob", off, LOGPROB, f"{where}, {piece!r}")
        kl = (got.exp() * (got - clean)).sum().item()
        worst.note("kl", abs(kl - trial["next"]["kl"]) / (1 + kl), KL, where)
        done += 1
    return done


def compare_probe(reference, trial, prompt, vectors, layers, worst, where):
    _, streams = reference.of_clean(prompt["tokens"])
    start, end = prompt["probe"]
    probe = trial["probe"]
    sentence = trial["sentence"]
    if "".join(probe["pieces"]).strip() != sentence:
        worst.note("tokens", 1, 0, where)
    for at, layer in enumerate(probe["layers"]):
        rows, vector = streams[layer, start:end], vectors[trial["concept"]][at]
        along = rows @ vector / vector.norm()
        cosine = along / rows.norm(dim=-1)
        off = (cosine - torch.tensor(probe["cosine"][at])).abs().max().item()
        worst.note("cosine", off, COSINE, f"{where}, layer {layer}")
        off = ((along - torch.tensor(probe["projection"][at])) / rows.norm(dim=-1)).abs().max().item()
        worst.note("projection", off, COSINE, f"{where}, layer {layer}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--inkling", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--hf", required=True)
    parser.add_argument("--count", type=int, default=4)
    args = parser.parse_args()
    reference = Reference(args.hf)
    failed = False
    for name, parts in [("thought-vs-text", ["readout", "pairs"]), ("prefill", ["mouth", "guard"]),
                        ("intentional-control", ["control"])]:
        with tempfile.TemporaryDirectory() as work:
            work = pathlib.Path(work)
            text = (ROOT / "experiments" / f"{name}.toml").read_text()
            for field in ("max_tokens = 20\n", "max_tokens = 15\n"):
                text = text.replace(field, "")
            text = text.replace('kind = "sample"', 'kind = "readout"')
            (work / "protocol.toml").write_text(text)
            command = [args.inkling, "run", str(work / "protocol.toml"), "--model", args.model, "--dtype", "f32",
                       "--out", str(work / "run")]
            for part in parts:
                command += ["--set", f"parts.{part}.count={args.count}"]
                if name != "intentional-control":
                    command += ["--set", f"parts.{part}.layers=[6, 17, 26]", "--set", f"parts.{part}.doses=[0.25, 1]"]
            subprocess.run(command, check=True, capture_output=True)
            worst = Worst()
            done = compare(reference, work / "run", worst)
            print(f"{name}: {done} trials")
            failed |= done == 0
            for what, (off, limit, where) in worst.items():
                failed |= not off <= limit
                print(f"  {what}: worst {off:.2e} (limit {limit:g}) {'' if off <= limit else 'OFF at ' + where}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
