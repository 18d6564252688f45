"""Makes the committed fixtures of tests/golden with transformers, on the CPU, in f32.

    python make_golden.py tiny              three tiny random models, requests, captured tensors, continuations
    python make_golden.py families [NAME]   likewise one of every family (golden_families.py), with fewer requests
    python make_golden.py operations        random mixtures of operations on some of them
    python make_golden.py patches           random operations on heads, and rows of other requests put in place, on them
    python make_golden.py templates HF_FOLDER    chats through every template of tests/templates (folder as for demo)
    python make_golden.py sampling          probabilities left by temperature, top-k, top-p and min-p
    python make_golden.py quants            random blocks of every tensor type, and their values by gguf-py
    python make_golden.py demo HF_FOLDER    the demo model (its folder from gguf_to_hf.py --dtype float32): chats,
                                            captured rows, continuations, and its tokenizer's answers

Every number in them is transformers' own (or gguf-py's); nothing of inkling takes part. Made again, token ids are
the same and floats agree to rounding.

Needs: torch, transformers, safetensors, gguf.
"""

import json
import random
import sys
from pathlib import Path

import jinja2
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import chat_template_utils

import golden_families
from golden_families import LAYERS, OUTLIERS
from golden_texts import CHATS, PROMPTS, TEMPLATE_CHATS, TEXTS
from hf_reference import BLOCK_SITES, HEAD_SITES, OPS, Reference, chat_text, read_requests, write_lines

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"

# Awkward on purpose: no width is a multiple of 32, head_dim is not dim / heads in two of them, ffn is an odd multiple.
TINY = {
    "plain": dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, intermediate_size=104,
                  vocab_size=131, rope_theta=10000.0),
    "mqa": dict(hidden_size=80, num_attention_heads=4, num_key_value_heads=1, head_dim=24, intermediate_size=136,
                vocab_size=300, rope_theta=500000.0, tie_word_embeddings=True),
    "sharded": dict(hidden_size=72, num_attention_heads=4, num_key_value_heads=2, head_dim=20, intermediate_size=118,
                    vocab_size=257, rope_theta=10000.0, eos_token_id=[49, 127]),
}  # fmt: skip


def tiny_model(settings, seed):
    """Random weights whose stream grows over the layers, has outlier channels, and ends in spread-out logits."""
    torch.manual_seed(seed)
    config = LlamaConfig(num_hidden_layers=LAYERS, max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=1,
                         **({"eos_token_id": 2, "tie_word_embeddings": False} | settings))  # fmt: skip
    model = LlamaForCausalLM(config)
    outliers = list(OUTLIERS)
    gains = {"q_proj": 1.4, "k_proj": 1.4, "lm_head": 2.5}
    # Tied, a token would predict itself for ever, or the one with the largest outlier follow every other.
    spread, outlier = (0.2, 1.5) if config.tie_word_embeddings else (0.3, 6.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            part = name.split(".")[-2]
            if weight.ndim == 1:
                weight.uniform_(0.6, 1.4)
                weight[outliers] *= 0.3
            elif part == "embed_tokens":
                weight.normal_(std=spread)
                weight[:, outliers] *= outlier
            else:
                weight.normal_(std=gains.get(part, 1.0) * weight.shape[1] ** -0.5)
                if part in ("o_proj", "down_proj"):
                    weight[outliers] *= 4.0
    return model


def save_model(name, model, folder):
    """`plain` gets the config.json of older transformers; `mqa` is stored in bf16; `sharded` in two files."""
    if name == "mqa":
        model = model.to(torch.bfloat16)
    shard = "400KB" if name == "sharded" else "50GB"
    model.save_pretrained(folder, max_shard_size=shard)
    if name == "plain":
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["torch_dtype"] = config.pop("dtype")
        config["rope_scaling"] = None
        del config["head_dim"]
        path.write_text(json.dumps(config, indent=2) + "\n")


def tiny_vectors(dim):
    """Two vectors as long as the stream, and one with a row a layer."""
    def rows(count, norm):
        v = torch.randn(count, dim)
        return v * norm / v.norm(dim=-1, keepdim=True)

    return {"ocean": rows(1, 4.0)[0], "dust": rows(1, 0.5)[0], "bread": rows(LAYERS, 3.0)}


def inject(vector, site, layer, strength, mode, start=None, end=None):
    part = {"vector": f"vectors.safetensors#{vector}", "site": site, "layer": layer, "strength": strength,
            "strength_mode": mode}  # fmt: skip
    window = {"from": start, "to": end}
    return part | {edge: at for edge, at in window.items() if at is not None}


def capture(positions, full):
    """Every site of every block; not `full`: each row of the stream once."""
    sites = dict.fromkeys(BLOCK_SITES, "all") if full else {"resid_pre": [0], "resid_mid": "all", "resid_post": "all"}
    parts = [{"site": site, "layers": layers, "positions": positions} for site, layers in sites.items()]
    return parts + [{"site": site, "positions": positions} for site in ("final_norm", "logits")]


# id, prompt length, injections, captured positions. Windows cross the edges of pages (16) and tiles (64).
TINY_REQUESTS = [
    ("one_clean", 1, [], "all"),
    ("one_all", 1, [inject("ocean", "resid_post", 0, 1.0, "raw")], "all"),
    ("short_clean", 17, [], "all"),
    ("short_embedding", 17, [inject("ocean", "resid_pre", 0, 0.5, "raw", 0, 1)], [0, 1, 15, 16]),
    ("short_last_layer", 17, [inject("dust", "resid_post", 2, 4.0, "unit", 9)], [8, 9, 16]),
    ("page_middle", 33, [inject("ocean", "resid_post", 0, 1.0, "raw", 10, 20)], [9, 10, 15, 16, 19, 20, 32]),
    ("page_last", 33, [inject("bread", "resid_mid", 2, 0.8, "row", -1)], [31, 32]),
    ("page_single", 33, [inject("bread", "resid_post", 1, 1.0, "raw", 16, 17)], [15, 16, 17, 32]),
    ("tile_clean", 70, [], [0, 15, 16, 63, 64, 69]),
    ("tile_mid", 70, [inject("dust", "resid_mid", 1, 3.0, "unit", 60, 68)], [59, 60, 63, 64, 67, 68, 69]),
    ("tile_open", 70, [inject("ocean", "resid_pre", 1, 0.6, "reference", 32)], [31, 32, 63, 64, 69]),
    ("tile_negative", 70, [inject("ocean", "resid_mid", 0, -2.0, "unit", -30, -5)], [39, 40, 64, 65, 69]),
    ("same_site", 70, [inject("ocean", "resid_post", 1, 0.5, "row", 20, 50),
                       inject("dust", "resid_pre", 2, 3.0, "raw", 40, 66)], [19, 20, 39, 40, 50, 65, 66, 69]),
    ("same_twice", 70, [inject("bread", "resid_post", 0, 0.5, "reference", 0, 64),
                        inject("ocean", "resid_post", 0, -0.7, "raw", 63)], [0, 1, 62, 63, 64, 69]),
    ("long_clean", 200, [], [0, 64, 127, 128, 199]),
    ("long_row", 200, [inject("bread", "resid_post", 1, 0.5, "row", 120, 140)], [119, 120, 127, 128, 139, 140, 199]),
    ("long_many", 200, [inject("ocean", "resid_pre", 0, 0.4, "raw", 5, 50),
                        inject("bread", "resid_post", 0, 0.4, "reference", 16, 64),
                        inject("dust", "resid_mid", 1, 0.3, "row", 100, 180),
                        inject("ocean", "resid_mid", 2, 1.5, "unit", -40)], [4, 5, 16, 49, 63, 64, 100, 160, 180, 199]),
    ("fork", -90, [inject("ocean", "resid_post", 1, 0.5, "reference", 21, 80)], [19, 20, 21, 64, 79, 80, 89]),
]  # fmt: skip
# Not for `forward`: no prompt position is touched.
TINY_GENERATE_ONLY = [
    ("generated_only", 33, [inject("ocean", "resid_post", 1, 4.0, "unit", 33)]),
    ("generated_window", 70, [inject("bread", "resid_mid", 1, 0.8, "row", 75, 95)]),
]
TINY_FULL = ["one_clean", "short_clean", "tile_mid", "long_many"]
TINY_GENERATED = ["one_clean", "short_clean", "page_middle", "page_last", "tile_open", "same_twice", "long_clean",
                  "long_many", "fork"]  # fmt: skip
GREEDY = {"temperature": 0, "max_tokens": 64, "ignore_eos": True}


def tiny_prompts(vocab):
    """Prompt of a length: all are prefixes of one, but a negative length's, which leaves it at position 20."""
    trunk, branch = torch.randint(0, vocab, (2, 200)).tolist()
    return lambda length: trunk[:length] if length > 0 else trunk[:20] + branch[: -length - 20]


def tiny_requests(prompt, full=TINY_FULL):
    forward, generate = [], []
    for name, length, edits, positions in TINY_REQUESTS:
        request = {"id": name, "tokens": prompt(length), "inject": edits}
        forward.append(request | {"capture": capture(positions, name in full)})
        if name in TINY_GENERATED:
            generate.append(request | {"sampling": GREEDY})
    for name, length, edits in TINY_GENERATE_ONLY:
        generate.append({"id": name, "tokens": prompt(length), "inject": edits, "sampling": GREEDY})
    return forward, generate


def tiny():
    for seed, (name, settings) in enumerate(TINY.items()):
        folder = GOLDEN / name
        folder.mkdir(parents=True, exist_ok=True)
        save_model(name, tiny_model(settings, seed), folder)
        (folder / "generation_config.json").unlink()
        save_file(tiny_vectors(settings["hidden_size"]), folder / "vectors.safetensors")
        answer(name, folder, *tiny_requests(tiny_prompts(settings["vocab_size"])))


def answer(name, folder, forward, generate):
    """Writes requests beside a model, and transformers' answers to them."""
    write_lines(folder / "requests.jsonl", forward)
    write_lines(folder / "generate.jsonl", generate)
    reference = Reference(folder)
    tensors = {}
    for request in read_requests(folder / "requests.jsonl"):
        tensors |= reference.answer(request, folder)[0]
    save_file(tensors, folder / "expected.safetensors")
    continuations = [reference.answer(r, folder, True)[1] for r in read_requests(folder / "generate.jsonl")]
    write_lines(folder / "generated.jsonl", continuations)
    describe(name, tensors, continuations)


# Of TINY_REQUESTS; prompts longer than every window.
FAMILY_REQUESTS = ["one_all", "tile_mid", "tile_open", "same_site", "long_many"]
FAMILY_GENERATED = ["tile_open", "long_many", "generated_only"]


def families(only=None):
    for seed, name in enumerate(golden_families.FAMILIES):
        if only not in (None, name):
            continue
        folder = GOLDEN / "families" / name
        folder.mkdir(parents=True, exist_ok=True)
        # One in half precision, which the folders of some older models have.
        stored = torch.float16 if name == "granite" else torch.bfloat16
        model = golden_families.model(name, 100 + seed).to(stored)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        text = model.config.get_text_config()
        torch.manual_seed(seed)
        save_file(tiny_vectors(text.hidden_size), folder / "vectors.safetensors")
        forward, generate = tiny_requests(tiny_prompts(text.vocab_size), [n for n in FAMILY_REQUESTS if n != "long_many"])
        forward = [request for request in forward if request["id"] in FAMILY_REQUESTS]
        generate = [request for request in generate if request["id"] in FAMILY_GENERATED]
        answer(name, folder, forward, generate)


OPERATED = ("plain", "families/gemma2", "families/granite", "families/olmo2", "families/mixtral")


def operation(dice, length):
    """An injection of any kind, at any site, in any window, some under a condition."""
    part = {"op": dice.choice(OPS), "site": dice.choice(BLOCK_SITES), "layer": dice.randrange(LAYERS)}
    low = dice.uniform(-1, 1)
    fields = {
        "add": {"strength": dice.uniform(-2, 2)},
        "set": {"strength": dice.uniform(-2, 2)},
        "replace": {"strength": dice.uniform(0.5, 2)},
        "scale": {"strength": dice.uniform(0, 1.5)},
        "clamp": dice.choice([{"min": low}, {"max": low}, {"min": low, "max": low + 0.5}]),
        "project_out": {},
    }
    part |= fields[part["op"]]
    vector = dice.choice(["ocean", "dust", "bread"])
    if part["op"] != "scale":
        part |= {"vector": f"vectors.safetensors#{vector}", "keep_norm": dice.random() < 0.25}
    if part["op"] in ("add", "set", "replace", "clamp"):
        part["strength_mode"] = dice.choice(["raw", "unit", "reference"])
        if part["site"] in ("attn_out", "mlp_out") and part["strength_mode"] == "reference":
            part["strength_mode"] = "raw"
    start = dice.randrange(length - 2)
    part["window"] = {"from": start} | dice.choice([{}, {"to": dice.randrange(start + 2, length + 5)}, {"every": 3}])
    if part["layer"] > 0 and dice.random() < 0.4:
        part["when"] = {
            "vector": "vectors.safetensors#ocean",
            "layer": dice.randrange(part["layer"]),
            "site": dice.choice(BLOCK_SITES),
            "measure": dice.choice(["cosine", "coordinate"]),
            **dice.choice([{"above": 0.05}, {"below": -0.02}, {"above": -0.3, "below": 0.1}]),
            "latch": dice.random() < 0.5,
        }
        if part["site"] == "resid_pre" and part["when"]["site"] == "resid_post":
            part["when"]["latch"] = False  # they may be one site: decided too late to hold for earlier rows
    return part


def operations():
    """Random mixtures of operations, on models that add their branches in different ways."""
    for seed, name in enumerate(OPERATED):
        folder, dice = GOLDEN / name, random.Random(seed)
        prompt = read_requests(folder / "requests.jsonl")[-1]["tokens"]
        requests = []
        for number in range(16):
            length = dice.randrange(6, 24)
            edits = [operation(dice, length) for _ in range(dice.choice([1, 1, 2, 4]))]
            edits.sort(key=lambda part: part["site"] == "resid_pre")  # hooks see resid_pre.L+1 after resid_post.L
            capture = [{"site": site, "layers": [dice.randrange(LAYERS)]} for site in ("attn_out", "mlp_out", "resid_mid")]
            requests.append({
                "id": f"mixture-{number}",
                "tokens": prompt[:length],
                "inject": edits,
                "capture": capture + [{"site": "resid_post", "layers": "all"}, {"site": "logits", "positions": "last"}],
                "sampling": GREEDY | {"max_tokens": 16},
            })
        write_lines(folder / "operations.jsonl", requests)
        reference, tensors, continuations = Reference(folder), {}, []
        for request in read_requests(folder / "operations.jsonl"):
            captures, continuation = reference.answer(request, folder, True)
            tensors |= captures
            continuations.append(continuation)
        save_file(tensors, folder / "operations.safetensors")
        write_lines(folder / "operations-generated.jsonl", continuations)
        describe(name, tensors, continuations)


def patches():
    """Operations on heads of attention, and what other requests show put in place, with captures of heads."""
    for seed, name in enumerate(OPERATED):
        folder, dice = GOLDEN / name, random.Random(100 + seed)
        prompt = read_requests(folder / "requests.jsonl")[-1]["tokens"]
        config = json.loads((folder / "config.json").read_text())
        heads = config["num_attention_heads"]
        shape = (heads, config.get("head_dim") or config["hidden_size"] // heads)
        requests = []
        for number in range(8):
            length = dice.randrange(8, 24)
            other = {"id": f"source-{number}", "tokens": dice.sample(prompt, length)}
            other["inject"] = dice.choice([[], [operation(dice, length)]])
            edits = [patched(dice, length, other["id"], shape) for _ in range(dice.choice([1, 1, 2, 3]))]
            edits.sort(key=lambda part: part["site"] == "resid_pre")
            capture = [{"site": site, "layers": [dice.randrange(LAYERS)]} for site in HEAD_SITES]
            requests += [other | {"capture": [{"site": "head_out", "layers": [0], "positions": "last"}], "sampling": GREEDY | {"max_tokens": 2}}, {
                "id": f"patched-{number}",
                "tokens": prompt[:length],
                "inject": edits,
                "capture": capture + [{"site": "resid_post", "layers": "all"}, {"site": "logits", "positions": "last"}],
                "sampling": GREEDY | {"max_tokens": 16},
            }]  # fmt: skip
        write_lines(folder / "patches.jsonl", requests)
        reference, tensors, continuations = Reference(folder), {}, []
        reference.others = {request["id"]: request for request in requests}
        for request in read_requests(folder / "patches.jsonl"):
            captures, continuation = reference.answer(request, folder, True)
            tensors |= captures
            continuations.append(continuation)
        save_file(tensors, folder / "patches.safetensors")
        write_lines(folder / "patches-generated.jsonl", continuations)
        describe(name, tensors, continuations)


def patched(dice, length, other, shape):
    """An injection into a head, or of what another request shows."""
    heads, width = shape
    part = {"site": dice.choice([*BLOCK_SITES, "head_out", "head_out", "head_out"]), "layer": dice.randrange(LAYERS)}
    if part["site"] == "head_out":
        part["head"] = dice.choice([dice.randrange(heads), sorted(dice.sample(range(heads), 2))])
    if part["site"] == "head_out" and dice.random() < 0.5:
        part |= dice.choice([
            {"op": "scale", "strength": 0.0},
            {"op": "add", "strength": 1.5, "strength_mode": "row"},
            {"op": "set", "strength": 0.4, "keep_norm": True},
            {"op": "project_out"},
        ])  # fmt: skip
        if part["op"] != "scale":
            part["vector"] = [round(dice.gauss(0, 1), 3) for _ in range(width)]
        part["window"] = {"from": dice.randrange(length - 2)}
        return part
    start = dice.randrange(length - 4)
    every = dice.choice([1, 1, 2])
    part |= {"op": dice.choice(["replace", "replace", "add"]), "source": {"request": other}}
    part["window"] = {"from": start, "to": start + 4, "every": every}
    if part["op"] == "add":
        part["strength"] = dice.uniform(-1, 1)
    # The same positions, as many others, or a single one at all.
    first = dice.randrange(length - 4)
    window = dice.choice([None, {"from": first, "to": first + 4, "every": every}, {"at": dice.randrange(length)}])
    if window:
        part["source"]["window"] = window
    if dice.random() < 0.3:
        part["source"]["layer"] = dice.randrange(LAYERS)
    return part


def describe(name, tensors, continuations):
    """What makes a fixture weak shows here: flat logits, a stream that doesn't grow, ties."""
    for key in ("resid_pre.0", "resid_post.2", "logits"):
        rows = tensors.get(f"short_clean/{key}")
        if rows is not None:
            norms = rows.norm(dim=-1)
            print(f"{name} {key}: std {rows.std():.3f} norm {norms.mean():.2f} max/median channel "
                  f"{rows.abs().mean(0).max() / rows.abs().mean(0).median():.1f}")  # fmt: skip
    margins = sorted(m for c in continuations for m in c["margins"])
    distinct = [len(set(c["tokens"])) for c in continuations]
    print(f"{name}: {len(margins)} margins, smallest {margins[:3]}, median {margins[len(margins) // 2]:.3f}, "
          f"distinct tokens {distinct}")  # fmt: skip


TEMPLATES = GOLDEN.parent / "templates"
DATE = "2025-03-09"


def templates(source):
    """Texts as transformers renders them, or that it refuses to."""
    tokenizer = AutoTokenizer.from_pretrained(source)

    class Day(chat_template_utils.datetime):
        @classmethod
        def now(cls, *_):
            return cls.fromisoformat(DATE)

    chat_template_utils.datetime = Day
    lines = []
    for path in sorted(TEMPLATES.glob("*.jinja")):
        template = path.read_text()
        for at, chat in enumerate(TEMPLATE_CHATS):
            if chat.get("thinking", "template") != "template" and "enable_thinking" not in template:
                continue
            request = {"id": f"{path.stem}-{at}"} | chat | ({"date": DATE} if "strftime_now" in template else {})
            try:
                text = template_text(tokenizer, template, chat)
            except jinja2.TemplateError:
                text = None
            lines.append({"template": path.stem, "request": request, "text": text})
    write_lines(GOLDEN / "templates.jsonl", lines)
    print(len(lines), "chats, refused:", sum(line["text"] is None for line in lines))


def template_text(tokenizer, template, chat):
    turns = list(chat["messages"])
    if "system" in chat:
        turns.insert(0, {"role": "system", "content": chat["system"]})
    options = {"chat_template": template, "tokenize": False}
    if chat.get("thinking", "template") != "template":
        options["enable_thinking"] = chat["thinking"] == "on"
    if turns[-1]["role"] == "assistant":
        return tokenizer.apply_chat_template(turns, continue_final_message=True, **options)
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options) + chat.get("prefill", "")


def sampling():
    """Logits with ties and a long tail through transformers' warpers, in its order."""
    torch.manual_seed(11)
    cases = []
    for temperature, top_k, top_p, min_p in [
        (1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (1.3, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.1),
        (0.8, 20, 0.95, 0.0), (1.5, 12, 0.8, 0.05), (1.0, 1, 1.0, 0.0), (1.0, 0, 0.01, 0.0), (0.3, 60, 0.5, 0.3),
    ]:  # fmt: skip
        scores = torch.randn(1, 61, dtype=torch.float64) * 3
        logits = scores[0].tolist()
        scores = TemperatureLogitsWarper(temperature)(None, scores)
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        if min_p > 0:
            scores = MinPLogitsWarper(min_p)(None, scores)
        cases.append({"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "logits": logits,
                      "probabilities": scores.softmax(-1)[0].tolist()})  # fmt: skip
    write_lines(GOLDEN / "sampling.jsonl", cases)


# Where the f16 scales (and minima) of a block stand, in bytes; the last ones are counted from its end.
SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [-4, -2], "Q3_K": [-2],
          "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [-2]}  # fmt: skip
BLOCKS = 4


def quants():
    """Bytes at random, scales within reason (one of them subnormal), so that every bit of a block matters."""
    random = np.random.default_rng(5)
    tensors = {}
    for kind in ("F32", "F16", "BF16", *SCALES):
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        if kind in SCALES:
            blocks = random.integers(0, 256, (BLOCKS, size), dtype=np.uint8)
            for at in SCALES[kind]:
                scales = random.normal(0, 0.02, BLOCKS).astype(np.float16)
                scales[-1] = 3e-6
                at = at % size
                blocks[:, at : at + 2] = scales.view(np.uint8).reshape(BLOCKS, 2)
        else:
            single = random.normal(0, 1, 32).astype(np.float32)
            blocks = quantize(single, GGMLQuantizationType[kind]).view(np.uint8).reshape(1, -1)
        data = np.ascontiguousarray(blocks).reshape(-1)
        tensors[f"{kind}.bytes"] = torch.from_numpy(data.copy())
        expected = dequantize(data, GGMLQuantizationType[kind]).astype(np.float32)
        tensors[f"{kind}.values"] = torch.from_numpy(expected.reshape(-1).copy())
    (GOLDEN / "quants").mkdir(parents=True, exist_ok=True)
    save_file(tensors, GOLDEN / "quants" / "blocks.safetensors")


def demo(source):
    folder = GOLDEN / "smollm2"
    folder.mkdir(parents=True, exist_ok=True)
    reference = Reference(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    demo_tokens(tokenizer, GOLDEN / "smollm2_tokens.json")
    torch.manual_seed(3)
    save_file({"thought": torch.randn(reference.model.config.hidden_size)}, folder / "vectors.safetensors")
    write_lines(folder / "requests.jsonl", demo_requests(tokenizer))
    tensors, continuations = {}, []
    for request in read_requests(folder / "requests.jsonl"):
        captures, continuation = reference.answer(request, folder, True)
        tensors |= captures
        continuations.append({"prompt": reference.render(request)} | continuation)
        print(request["id"], repr(tokenizer.decode(continuation["tokens"]))[:150])
    save_file(tensors, folder / "expected.safetensors")
    write_lines(folder / "generated.jsonl", continuations)
    describe("smollm2", tensors, continuations)


# Of injection number i: site, layer, strength, mode and where the window starts, as a share of the prompt.
DEMO_INJECTIONS = [
    ("resid_post", 12, 0.5, "reference", 0.5), ("resid_post", 20, 0.5, "reference", 0.0),
    ("resid_mid", 15, 0.4, "row", 0.6), ("resid_pre", 8, 0.5, "reference", 0.7),
    ("resid_post", 24, 60.0, "unit", 0.4), ("resid_post", 20, 2.0, "raw", 0.8),
    ("resid_mid", 20, 0.5, "reference", 0.3), ("resid_post", 28, 0.6, "row", 0.5),
    ("resid_pre", 0, 0.5, "reference", 0.9), ("resid_post", 5, 0.5, "row", 0.25),
]  # fmt: skip


def demo_requests(tokenizer):
    """Each prompt clean and injected; the norms at `resid_post.20` are about 100."""
    requests = []
    for i, messages in enumerate(PROMPTS):
        length = len(tokenizer(chat_text(tokenizer, {"messages": messages}), add_special_tokens=False)["input_ids"])
        site, layer, strength, mode, share = DEMO_INJECTIONS[i]
        edit = inject("thought", site, layer, strength, mode, int(share * length))
        for condition, edits in (("clean", []), ("injected", [edit])):
            request = {"id": f"{i}_{condition}", "messages": messages, "inject": edits, "capture": demo_captures(i == 0)}
            requests.append(request | {"sampling": GREEDY})
    return requests


def demo_captures(logits):
    parts = [{"site": site, "layers": layers, "positions": "last"} for site, layers in
             [("resid_post", [0, 12, 29]), ("resid_mid", [20]), ("attn_out", [12]), ("mlp_out", [20])]]  # fmt: skip
    parts.append({"site": "final_norm", "positions": "last"})
    return parts + ([{"site": "logits", "positions": "last"}] if logits else [])


def demo_tokens(tokenizer, path):
    texts = [{"text": text, "tokens": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in TEXTS]
    chats = []
    for chat in CHATS:
        text = chat_text(tokenizer, chat)
        chats.append({"request": chat, "text": text, "tokens": tokenizer(text, add_special_tokens=False)["input_ids"]})
    path.write_text(json.dumps({"texts": texts, "chats": chats}, ensure_ascii=False, indent=0) + "\n")


def main():
    torch.set_num_threads(1)
    actions = {"tiny": tiny, "families": families, "operations": operations, "patches": patches, "templates": templates, "sampling": sampling, "quants": quants, "demo": demo}
    if len(sys.argv) < 2 or sys.argv[1] not in actions:
        raise SystemExit(__doc__)
    actions[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
