"""Answers requests with Hugging Face transformers, in the format of `inkling forward` and `inkling generate`.

    python hf_reference.py MODEL_DIR requests.jsonl OUT.safetensors [--dtype float32] [--generated OUT.jsonl]

The independent side of every parity check. Of a request it understands

  id        names the answer
  tokens    token ids; or text; or messages, rendered with the model's template (system and prefill too; a final
            assistant message is continued)
  inject    vector "FILE.safetensors#TENSOR", (dim,) or (layers, dim), or the numbers themselves, or source: request,
            site, layer, head, window (from, to or at) of another one in the file; layer: one or a list;
            site resid_pre, resid_mid, resid_post, attn_out, mlp_out or head_out with a head; op add, project_out, set, clamp (min, max),
            replace or scale; strength; strength_mode raw, unit, row or reference; keep_norm; from and to as token
            indices (negative: from the prompt's end), to null: generated tokens too, or window with from, to and every;
            when: vector, layer, site, measure cosine or coordinate, above, below, latch
  capture   site resid_pre, resid_mid, resid_post, attn_out, mlp_out, head_out, q, k, v (after rope), final_norm or
            logits; layers: a list or "all";
            positions: "all", "last" or a list
  sampling  max_tokens, for --generated: greedy, past stop tokens (temperature 0 and ignore_eos, where given)

and refuses everything else. Tensors are f32, "{id}/{site}.{layer}" (positions, dim), "{id}/final_norm" and
"{id}/logits" (positions, width), of heads (positions, heads, width). resid_post.L and resid_pre.L+1 are one site, shown after the injections of both.
Each generated line also holds `margins`: by how much the chosen token's logit led the second's.

Needs: torch, transformers, safetensors.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

STREAM_SITES = ("resid_pre", "resid_mid", "resid_post")
BLOCK_SITES = (*STREAM_SITES, "attn_out", "mlp_out")
HEAD_SITES = ("head_out", "q", "k", "v")
MODES = ("raw", "unit", "row", "reference")
OPS = ("add", "project_out", "set", "clamp", "replace", "scale")
KNOWN = {
    "request": {"id", "tokens", "text", "messages", "system", "prefill", "inject", "capture", "sampling"},
    "inject": {"vector", "layer", "site", "op", "strength", "strength_mode", "from", "to", "min", "max", "keep_norm",
               "window", "when", "head", "source"},
    "source": {"request", "site", "layer", "head", "window"},
    "when": {"vector", "layer", "site", "measure", "above", "below", "latch"},
    "window": {"from", "to", "every", "at"},
    "capture": {"site", "layers", "positions"},
    "sampling": {"max_tokens", "temperature", "ignore_eos", "seed"},
}


def refuse(request, why):
    raise SystemExit(f"request {request.get('id')!r} is not answered here: {why}")


def check(request):
    """Stops at anything this script would otherwise ignore."""
    parts = [("request", request), ("sampling", request.get("sampling", {}))]
    parts += [("inject", part) for part in request.get("inject", [])]
    parts += [(kind, part[kind]) for part in request.get("inject", []) for kind in ("when", "window", "source")
              if kind in part]
    parts += [("capture", part) for part in request.get("capture", [])]
    for kind, part in parts:
        if unknown := set(part) - KNOWN[kind]:
            refuse(request, f"{kind} has {sorted(unknown)}")
    for part in request.get("inject", []):
        if part.get("op", "add") not in OPS or part.get("site", "resid_post") not in (*BLOCK_SITES, "head_out"):
            refuse(request, f"injection {part}")
        if part.get("strength_mode", "raw") not in MODES:
            refuse(request, f"strength_mode {part['strength_mode']}")
    for part in request.get("capture", []):
        if part["site"] not in (*BLOCK_SITES, *HEAD_SITES, "final_norm", "logits"):
            refuse(request, f"capture site {part['site']}")
    sampling = request.get("sampling", {})
    if sampling.get("temperature", 0) != 0 or not sampling.get("ignore_eos", True):
        refuse(request, "only greedy continuations that run past stop tokens")


def first(output):
    """The hidden states of a module's output, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output


class Reference:
    """A transformers model whose residual stream is edited and read by hooks."""

    def __init__(self, folder, dtype="float32"):
        self.folder = folder
        config = AutoConfig.from_pretrained(folder)
        # Some text models are parts of ones that see images.
        auto = AutoModelForImageTextToText if config.model_type == "mistral3" else AutoModelForCausalLM
        self.model = auto.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
        self.tokenizer = None
        text = getattr(self.model.model, "language_model", self.model.model)  # in a multimodal model
        self.blocks = text.layers
        self.others = {}  # {id: request} that sources may name
        self.edits = []  # the injections of the request at hand
        self.start = 0  # position of the first row of the call at hand
        self.seen = None  # {name: (rows, width)} of the call at hand, None: not wanted
        for index, block in enumerate(self.blocks):
            self.hook(index, block)
        text.norm.register_forward_hook(lambda _, __, out: self.show("final_norm", out))

    def hook(self, layer, block):
        """Hooks one block. Edits are made in place, so the stream that skips ahead sees them too."""
        after = hasattr(block, "post_feedforward_layernorm")  # families that normalise what they add
        around = hasattr(block, "pre_feedforward_layernorm")  # and what they read
        before_mlp = block.pre_feedforward_layernorm if around else block.mlp if after else block.post_attention_layernorm
        attn_out = block.post_attention_layernorm if after else block.self_attn
        mlp_out = block.post_feedforward_layernorm if after else block.mlp
        scale = getattr(block, "residual_multiplier", 1.0)

        def enter(_, args, kwargs):
            stream = args[0] if args else kwargs["hidden_states"]
            self.edit("resid_pre", layer, stream)
            if layer > 0:
                self.show(f"resid_post.{layer - 1}", stream)

        def add(site):
            def edit(_, __, out):
                branch = first(out)
                branch *= scale  # what is added is edited and shown, and then as the block expects it
                self.edit(site, layer, branch)
                branch /= scale

            return edit

        block.register_forward_pre_hook(enter, with_kwargs=True)
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: self.edit_heads(layer, args[0]))
        self.watch_attention(block.self_attn, layer)
        attn_out.register_forward_hook(add("attn_out"))
        before_mlp.register_forward_pre_hook(lambda _, args: self.edit("resid_mid", layer, args[0]))
        mlp_out.register_forward_hook(add("mlp_out"))
        block.register_forward_hook(lambda _, __, out: self.edit("resid_post", layer, first(out)))

    def watch_attention(self, attention, layer):
        """Shows what the family's attention function is given: queries and keys after rope, values."""
        home = sys.modules[type(attention).__module__]
        given = home.eager_attention_forward
        shown = getattr(given, "shown", {})
        if not shown:

            def watch(module, query, key, value, *args, **kwargs):
                count = query.shape[2]
                for name, heads in (("q", query), ("k", key), ("v", value)):
                    shown[module](name, heads[:, :, -count:].transpose(1, 2))
                return given(module, query, key, value, *args, **kwargs)

            watch.shown = shown
            home.eager_attention_forward = watch
        shown[attention] = lambda name, heads: self.show(f"{name}.{layer}", heads)

    def show(self, name, stream):
        if self.seen is not None:
            self.seen[name] = stream[0].detach().float().clone()

    def edit_heads(self, layer, outputs):
        """Does what is injected into heads to `outputs` (1, rows, heads * width), in place, and shows them."""
        config = self.model.config.get_text_config()
        heads = outputs[0].unflatten(-1, (config.num_attention_heads, -1))
        for edit in self.edits:
            if (edit["site"], edit["layer"]) == ("head_out", layer):
                self.act(edit, heads[:, edit["head"]])
        self.show(f"head_out.{layer}", heads[None])

    def edit(self, site, layer, stream):
        """Does what is injected here to `stream` (1, rows, dim), in place, and shows the result."""
        rows = stream[0]
        for edit in self.edits:
            if edit["when"] and (edit["when"]["site"], edit["when"]["layer"]) == (site, layer):
                self.decide(edit, rows)
        for edit in self.edits:
            if (edit["site"], edit["layer"]) == (site, layer):
                self.act(edit, rows)
        self.show(f"{site}.{layer}", stream)

    def act(self, edit, rows):
        """Changes `rows` (rows, width) in place where the edit's window and condition hold them."""
        acts = self.in_window(edit, len(rows))
        if not acts.any():
            return
        acts = acts & edit["when"]["met"] if edit["when"] else acts
        if edit["vector"] is not None and edit["vector"].ndim == 2:  # each position its own
            behind = (torch.arange(self.start, self.start + len(rows))[acts] - edit["from"]) // edit["every"]
            edit = edit | {"vector": edit["vector"][behind]}
        rows[acts] = self.changed(edit, rows[acts])

    def in_window(self, edit, count, every=None):
        """Which rows of the call at hand the window holds."""
        positions = torch.arange(self.start, self.start + count)
        every = every or edit["every"]
        return (positions >= edit["from"]) & (positions < edit["to"]) & ((positions - edit["from"]) % every == 0)

    def decide(self, edit, rows):
        """Which rows meet the edit's condition; once met, a latched one holds for all that follow."""
        when = edit["when"]
        unit = when["vector"].to(rows.dtype) / when["vector"].norm()
        value = rows @ unit
        if when["measure"] == "cosine":
            value = value / rows.norm(dim=-1)
        met = (value > when["above"]) & (value < when["below"]) & self.in_window(edit, len(rows), every=1)
        if when["latch"]:
            met = (met.cumsum(0) > 0) | when["latched"]
            when["latched"] = bool(met[-1])
        when["met"] = met

    @staticmethod
    def changed(edit, rows):
        op, strength = edit["op"], edit["strength"]
        norms = rows.norm(dim=-1, keepdim=True)
        if op == "scale":
            return strength * rows
        vector = edit["vector"].to(rows.dtype)
        unit = vector / vector.norm(dim=-1, keepdim=True)
        size = {"row": norms, "reference": edit["reference"]}.get(edit["mode"], 1.0)
        direction = vector if edit["mode"] == "raw" else unit
        coordinate = (rows * unit).sum(-1, keepdim=True)
        if op == "add":
            after = rows + strength * size * direction
        elif op == "replace":
            after = (strength * size * direction).expand_as(rows)
        else:
            low, high = {"project_out": (0.0, 0.0), "set": (strength, strength)}.get(op, (edit["min"], edit["max"]))
            low, high = (bound * size * torch.ones_like(coordinate) for bound in (low, high))
            after = rows + (coordinate.clamp(low, high) - coordinate) * unit
        return after * norms / after.norm(dim=-1, keepdim=True) if edit["keep_norm"] else after

    def call(self, tokens, start=0, cache=None, edits=(), watch=False):
        """One forward call over `tokens`, which stand at positions `start..`."""
        self.edits, self.start, self.seen = list(edits), start, {} if watch else None
        with torch.inference_mode():
            out = self.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
        return out, self.seen

    def render(self, request):
        """The prompt's token ids."""
        if "tokens" in request:
            return list(request["tokens"])
        self.tokenizer = self.tokenizer or AutoTokenizer.from_pretrained(self.folder)
        if "text" in request:
            return self.tokenizer(request["text"])["input_ids"]
        return self.tokenizer(chat_text(self.tokenizer, request), add_special_tokens=False)["input_ids"]

    def resolve(self, request, length, base):
        """The request's injections with vectors loaded, windows as positions and norms measured."""
        edits = []
        for part in request.get("inject", []):
            window = part.get("window", part)
            places = [(layer, head) for layer in as_list(part["layer"]) for head in as_list(part.get("head"))]
            for layer, head in places:
                when = part.get("when")
                if when:
                    when = {"site": "resid_post", "measure": "cosine", "above": -math.inf, "below": math.inf,
                            "latch": False, "latched": False, "met": None} | when
                    when["vector"] = load_vector(when["vector"], when["layer"], base)
                edits.append({
                    "site": part.get("site", "resid_post"),
                    "layer": layer,
                    "head": head,
                    "op": part.get("op", "add"),
                    "strength": part.get("strength", 1.0),
                    "mode": part.get("strength_mode", "raw"),
                    "min": part.get("min", -math.inf),
                    "max": part.get("max", math.inf),
                    "keep_norm": part.get("keep_norm", False),
                    "vector": load_vector(part["vector"], layer, base) if "vector" in part else None,
                    "from": place(window.get("from"), length, 0),
                    "to": place(window.get("to"), length, math.inf),
                    "every": window.get("every", 1),
                    "when": when,
                    "reference": None,
                })
                if "source" in part:
                    edits[-1]["vector"] = self.rows_of(part["source"], edits[-1], base)
        return edits

    def rows_of(self, source, edit, base):
        """What another request shows: (width,) of one position, (positions, width) of several."""
        other = self.others[source["request"]]
        tokens = self.render(other)
        edits = self.resolve(other, len(tokens), base)
        self.measure(other, tokens, edits)
        _, seen = self.call(tokens, edits=edits, watch=True)
        rows = seen[f"{source.get('site', edit['site'])}.{source.get('layer', edit['layer'])}"]
        if edit["site"] == "head_out":
            rows = rows[:, source.get("head", edit["head"])]
        if "window" not in source:
            return rows[edit["from"] : edit["to"] : edit["every"]].squeeze(0)
        if "at" in (window := source["window"]):
            return rows[window["at"]]
        return rows[slice(window.get("from"), window.get("to"), window.get("every"))].squeeze(0)

    def measure(self, request, tokens, edits):
        """N of mode `reference`: the mean clean norm over the window's prompt positions but the first."""
        wanted = [edit for edit in edits if edit["mode"] == "reference"]
        if not wanted:
            return
        _, clean = self.call(tokens, watch=True)
        for edit in wanted:
            rows = clean[f"{edit['site']}.{edit['layer']}"][max(edit["from"], 1) : min(edit["to"], len(tokens))]
            if not len(rows):
                refuse(request, "a reference norm over no position")
            edit["reference"] = float(rows.norm(dim=-1).mean())

    def answer(self, request, base, generate=False):
        """(captured tensors by name, continuation or None)."""
        check(request)
        tokens = self.render(request)
        edits = self.resolve(request, len(tokens), base)
        self.measure(request, tokens, edits)
        out, seen = self.call(tokens, edits=edits, watch=True)
        seen["logits"] = out.logits[0].float()
        captures = {}
        for capture in request.get("capture", []):
            for name in self.names(capture):
                captures[f"{request['id']}/{name}"] = pick(seen[name], capture.get("positions", "all"))
        count = request.get("sampling", {}).get("max_tokens", 0)
        if not generate or count == 0:
            return captures, None
        new, margins = self.greedy(out, len(tokens), count, edits)
        return captures, {"id": request["id"], "prompt_tokens": len(tokens), "tokens": new, "margins": margins}

    def names(self, capture):
        if capture["site"] in ("final_norm", "logits"):
            return [capture["site"]]
        layers = capture.get("layers", "all")
        layers = range(len(self.blocks)) if layers == "all" else layers
        return [f"{capture['site']}.{layer}" for layer in layers]

    def greedy(self, out, position, count, edits):
        """`count` most likely tokens one after another, and each one's lead in logits."""
        new, margins = [], []
        while True:
            top = out.logits[0, -1].float().topk(2)
            new.append(int(top.indices[0]))
            margins.append(float(top.values[0] - top.values[1]))
            if len(new) == count:
                return new, margins
            out, _ = self.call(new[-1:], position, out.past_key_values, edits)
            position += 1


def chat_text(tokenizer, request):
    """The rendered chat."""
    turns = list(request["messages"])
    if "system" in request:
        turns.insert(0, {"role": "system", "content": request["system"]})
    if turns[-1]["role"] == "assistant":
        ending = {"continue_final_message": True}
    else:
        ending = {"add_generation_prompt": True}
    return tokenizer.apply_chat_template(turns, tokenize=False, **ending) + request.get("prefill", "")


def as_list(one_or_many):
    return one_or_many if isinstance(one_or_many, list) else [one_or_many]


def load_vector(spec, layer, base):
    """(dim,) f32: FILE#TENSOR, the layer's row where the tensor has one a layer; or the numbers."""
    if isinstance(spec, list):
        return torch.tensor(spec)
    file, _, name = spec.partition("#")
    vector = load_file(Path(base) / file)[name].float()
    return vector if vector.ndim == 1 else vector[layer]


def place(index, length, absent):
    """A window's edge as a position."""
    if index is None:
        return absent
    return index if index >= 0 else length + index


def pick(rows, positions):
    if positions == "all":
        return rows.contiguous()
    return rows[[-1] if positions == "last" else positions].contiguous()


def read_requests(path):
    with open(path) as lines:
        return [json.loads(line) for line in lines if line.strip()]


def write_lines(path, items):
    with open(path, "w") as out:
        out.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("requests")
    parser.add_argument("out")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--generated")
    options = parser.parse_args()

    reference = Reference(options.model, options.dtype)
    tensors, continuations = {}, []
    requests = read_requests(options.requests)
    reference.others = {request["id"]: request for request in requests}
    for request in requests:
        captures, continuation = reference.answer(request, Path(options.requests).parent, bool(options.generated))
        tensors |= captures
        continuations += [continuation] if continuation else []
    save_file(tensors, options.out)
    if options.generated:
        write_lines(options.generated, continuations)


if __name__ == "__main__":
    main()
