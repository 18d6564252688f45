"""Times Hugging Face transformers with a forward hook on the trials of `inkling bench trials`.

    python transformers_trials.py [--shape llama-3.1-8b] [--batches 32,128,256,512]
    python transformers_trials.py --model HF_DIR --device cpu --dtype f32 --batches 32,64,96 \\
        --prompt-tokens 180 --start 140 --new 60

The model is that of a Hugging Face folder, or has random weights, made on the device, of the named sizes. A trial is a
prompt of random tokens with a vector of its own added to one layer's output from a position on, through every generated
token, sampled at temperature 1 over the whole vocabulary with a KV cache; no trial stops early. One batch is timed for
each batch size, after a short one to warm up; the best size counts. On standard output one JSON object. Exits with an
error when the hook did not change the rows it should have. `--device cpu --shape tiny --batches 2,4` only tries the
script.

Needs: torch, transformers; for --model also safetensors.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

SHAPES = {
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=8192,
    ),
    "tiny": LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
}
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass
class Injection:
    """The forward hook of one layer."""

    vectors: torch.Tensor  # (batch, hidden)
    start: int  # first position that is changed
    seen: int = 0  # positions of this batch that went through the layer
    changed: int = 0  # rows

    def __call__(self, _module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output  # (batch, positions, hidden)
        first = max(self.start - self.seen, 0)
        self.seen += hidden.shape[1]
        rows = hidden[:, first:]
        rows += self.vectors[:, None]
        self.changed += rows.shape[0] * rows.shape[1]
        return output


def build(options):
    dtype = DTYPES[options.dtype]
    if options.model:
        named = {"dtype": dtype, "attn_implementation": "sdpa", "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(options.model, **named).to(options.device)
    else:
        with torch.device(options.device):
            config = SHAPES[options.shape]
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for config in (model.config, model.generation_config):  # nothing stops a trial early
        config.eos_token_id, config.bos_token_id, config.pad_token_id = None, None, 0
    return model.eval()


def generate(model, options, batch, new):
    """Runs one batch; returns its seconds."""
    config = model.config
    prompt = torch.randint(config.vocab_size, (1, options.prompt_tokens), device=options.device)
    vectors = torch.randn(batch, config.hidden_size, device=options.device, dtype=model.dtype)
    injection = Injection(vectors, options.start)
    hook = model.model.layers[options.layer].register_forward_hook(injection)
    try:
        wait(options)
        start = time.perf_counter()
        tokens = model.generate(
            prompt.repeat(batch, 1),
            attention_mask=torch.ones(batch, options.prompt_tokens, device=options.device, dtype=torch.long),
            max_new_tokens=new,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            use_cache=True,
        )
        wait(options)
        took = time.perf_counter() - start
    finally:
        hook.remove()
    # The last token is sampled and never read.
    expected = batch * (options.prompt_tokens - options.start + new - 1)
    if injection.changed != expected:
        raise SystemExit(f"the hook changed {injection.changed} rows, not {expected}")
    if tokens.shape != (batch, options.prompt_tokens + new):
        raise SystemExit(f"generate answered {tuple(tokens.shape)} tokens")
    return took


def wait(options):
    if options.device == "cuda":
        torch.cuda.synchronize()


def measure(model, options, batch):
    """The numbers of one batch size; of one that does not fit, only that."""
    try:
        # A whole prompt of a batch takes a processor as long as all its new tokens, and has little to warm up.
        generate(model, options, batch if options.device == "cuda" else min(2, batch), min(4, options.new))
        took = generate(model, options, batch, options.new)
    except torch.OutOfMemoryError:
        return {"batch": batch, "out_of_memory": True}
    finally:
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return {"batch": batch, "wall_s": took, "trials_per_s": batch / took, "tokens_per_s": batch * options.new / took}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="HF_DIR")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b", help="random weights; not with --model")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, help="of a processor; torch's own choice otherwise")
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--start", type=int, default=200)
    parser.add_argument("--layer", type=int, default=20)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--batches", default="32,128,256,512", type=lambda text: [int(b) for b in text.split(",")])
    parser.add_argument("--seconds", type=float, default=90, help="no further batch size is started after these")
    options = parser.parse_args()

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU")
    if options.model and not options.model.is_dir():
        raise SystemExit(f"no folder at {options.model}")
    transformers.utils.logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    torch.manual_seed(0)
    model = build(options)
    sizes = []
    with torch.inference_mode():
        for batch in options.batches:
            if not sizes or time.perf_counter() - begin < options.seconds:
                sizes.append(measure(model, options, batch))
    timed = [size for size in sizes if "trials_per_s" in size]
    if not timed:
        raise SystemExit("no batch size fits")
    about = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "shape": options.model.name if options.model else options.shape,
        "dtype": options.dtype,
        "weights": sum(weights.numel() for weights in model.parameters()),
    }
    asked = {name: getattr(options, name) for name in ("prompt_tokens", "start", "layer", "new")}
    print(json.dumps(about | asked | max(timed, key=lambda size: size["trials_per_s"]) | {"sizes": sizes}))


if __name__ == "__main__":
    main()
