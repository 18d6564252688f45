"""Writes requests that cover a model's whole stream, for parity.sh.

    python parity_requests.py HF_FOLDER OUT_DIR

OUT_DIR/requests.jsonl: chats clean and injected (all sites, all strength modes, depths over the whole model), every
position of resid_pre.0, resid_mid and resid_post of every block, and the logits; OUT_DIR/vectors.safetensors.

Needs: torch, transformers, safetensors.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from golden_texts import PROMPTS
from hf_reference import chat_text, write_lines

# site, depth, strength, mode, start as a share of the prompt (never its first position)
INJECTIONS = [
    ("resid_post", 0.4, 0.5, "reference", 0.5),
    ("resid_mid", 0.67, 0.4, "row", 0.6),
    ("resid_pre", 0.25, 0.5, "reference", 0.3),
    ("resid_post", 0.8, 1.0, "raw", 0.4),
    ("resid_post", 0.9, 20.0, "unit", 0.7),
]
CAPTURE = [
    {"site": "resid_pre", "layers": [0]},
    {"site": "resid_mid", "layers": "all"},
    {"site": "resid_post", "layers": "all"},
    {"site": "logits"},
]


def main():
    source, out = sys.argv[1], Path(sys.argv[2])
    config = AutoConfig.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(5)
    save_file({"thought": torch.randn(config.hidden_size)}, out / "vectors.safetensors")
    requests = []
    for i, (site, depth, strength, mode, share) in enumerate(INJECTIONS):
        request = {"messages": PROMPTS[i], "capture": CAPTURE}
        length = len(tokenizer(chat_text(tokenizer, request), add_special_tokens=False)["input_ids"])
        inject = {
            "vector": "vectors.safetensors#thought",
            "site": site,
            "layer": min(round(depth * config.num_hidden_layers), config.num_hidden_layers - 1),
            "strength": strength,
            "strength_mode": mode,
            "from": max(int(share * length), 1),
        }
        requests += [{"id": f"{i}_clean"} | request, {"id": f"{i}_injected", "inject": [inject]} | request]
    write_lines(out / "requests.jsonl", requests)


if __name__ == "__main__":
    main()
