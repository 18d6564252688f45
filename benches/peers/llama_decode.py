"""Times llama.cpp's decoding on a processor, without injections: what `inkling bench` is compared with.

    python llama_decode.py batched MODEL.gguf [--types bf16,f16] [--batches 16,32,64] [--prompt-tokens 180] [--new 60]
    python llama_decode.py single  MODEL.gguf [--types bf16,f16] [--prompt-tokens 64] [--new 128]

batched: sequences that share a prompt, which is computed once and is not timed, draw a token each in every step. Both
of llama.cpp's ways to keep their keys and values are timed: one cache for all, and one a sequence.
single: one sequence with its prompt, three times; the fastest counts, and its seconds include the prompt.

Tokens are random and nothing is sampled, as in llama.cpp's own batched-bench: what sampling costs is left out, in
llama.cpp's favour. The weights are turned into each of --types first (kept in --folder). On standard output one JSON
object; `best` is its fastest result.

Needs: llama-cpp-python, which pip builds with a C++ compiler; its AVX2 and AVX-512 code needs nothing else:
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" pip install llama-cpp-python
On a processor with AMX, llama.cpp's AMX code crashes when gcc 12 has built it. Leave it out there:
    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON -DGGML_AMX_TILE=OFF
        -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF -DLLAVA_BUILD=OFF" pip install llama-cpp-python
"""

import argparse
import ctypes
import json
import os
import random
import tempfile
import time
from pathlib import Path

import llama_cpp as llama

FILE_TYPES = {"bf16": llama.LLAMA_FTYPE_MOSTLY_BF16, "f16": llama.LLAMA_FTYPE_MOSTLY_F16}
SINGLE_RUNS = 3


@llama.llama_log_callback
def only_errors(level, text, _data):
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        os.write(2, text)


def turned(path, kind, options):
    """The model's file with weights of another type."""
    target = options.folder / f"{path.stem}.{kind}.gguf"
    if not target.exists():
        wanted = llama.llama_model_quantize_default_params()
        wanted.ftype, wanted.allow_requantize, wanted.nthread = FILE_TYPES[kind], True, options.threads
        part = target.with_suffix(".part")
        if llama.llama_model_quantize(str(path).encode(), str(part).encode(), ctypes.byref(wanted)):
            raise SystemExit(f"llama.cpp could not turn {path} into {kind}")
        part.rename(target)
    return target


def load(path):
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp could not open {path}")
    return model


class Sequences:
    """A context for some sequences, and a batch of tokens to feed it with."""

    def __init__(self, model, options, count, unified):
        length = options.prompt_tokens + options.new
        wanted = llama.llama_context_default_params()
        wanted.n_ctx = options.prompt_tokens + count * options.new if unified else count * (-(-length // 256) * 256)
        wanted.n_batch = wanted.n_ubatch = max(512, count, options.prompt_tokens)
        wanted.n_seq_max, wanted.kv_unified = count, unified
        wanted.n_threads = wanted.n_threads_batch = options.threads
        self.context = llama.llama_init_from_model(model, wanted)
        if not self.context:
            raise SystemExit(f"llama.cpp could not make a context of {count} sequences")
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self.batch = llama.llama_batch_init(wanted.n_batch, 0, 1)

    def feed(self, entries):
        """Runs (sequence, position, whether logits are wanted) with random tokens."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for at, (sequence, position, wanted) in enumerate(entries):
            batch.token[at], batch.pos[at] = random.randrange(self.vocab), position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = wanted
        if code := llama.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode answered {code}")
        llama.llama_synchronize(self.context)

    def prompt(self, tokens):
        self.feed([(0, position, position == tokens - 1) for position in range(tokens)])

    def share(self, count):
        for sequence in range(1, count):
            llama.llama_memory_seq_cp(llama.llama_get_memory(self.context), 0, sequence, -1, -1)

    def clear(self):
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def close(self):
        llama.llama_batch_free(self.batch)
        llama.llama_free(self.context)


def batched(model, options):
    results = []
    for count in options.batches:
        for unified in (True, False):
            sequences = Sequences(model, options, count, unified)
            sequences.prompt(options.prompt_tokens)
            sequences.share(count)
            steps = options.new - 1  # the prompt gives the first token
            start = time.perf_counter()
            for step in range(steps):
                sequences.feed([(sequence, options.prompt_tokens + step, True) for sequence in range(count)])
            took = time.perf_counter() - start
            sequences.close()
            rate = count * steps / took
            results.append({"batch": count, "unified": unified, "seconds": took, "tokens_per_s": rate})
    return results


def single(model, options):
    sequences = Sequences(model, options, 1, True)
    results = []
    for _ in range(SINGLE_RUNS):
        sequences.clear()
        start = time.perf_counter()
        sequences.prompt(options.prompt_tokens)
        prompt = time.perf_counter() - start
        for step in range(options.new - 1):
            sequences.feed([(0, options.prompt_tokens + step, True)])
        took = time.perf_counter() - start
        decode_rate = (options.new - 1) / (took - prompt)
        results.append({"seconds": took, "tokens_per_s": options.new / took, "decode_tokens_per_s": decode_rate})
    sequences.close()
    return [max(results, key=lambda result: result["tokens_per_s"])]


def numbers(text):
    return [int(number) for number in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["batched", "single"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--types", default="bf16,f16", type=lambda text: text.split(","))
    parser.add_argument("--batches", default="16,32,64", type=numbers)
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--new", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="for the turned weights; a temporary one otherwise")
    options = parser.parse_args()
    if unknown := set(options.types) - FILE_TYPES.keys():
        parser.error(f"--types knows {', '.join(FILE_TYPES)}, not {', '.join(sorted(unknown))}")
    lengths = {"batched": (180, 60), "single": (64, 128)}[options.what]
    options.prompt_tokens, options.new = options.prompt_tokens or lengths[0], options.new or lengths[1]

    random.seed(0)
    llama.llama_log_set(only_errors, ctypes.c_void_p(0))
    llama.llama_backend_init()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or Path(temporary)
        options.folder.mkdir(parents=True, exist_ok=True)
        for kind in options.types:
            model = load(turned(options.model, kind, options))
            measure = batched if options.what == "batched" else single
            results += [{"type": kind} | result for result in measure(model, options)]
            llama.llama_model_free(model)
    about = {
        "device": "cpu",
        "llama_cpp_python": llama.__version__,
        "system": llama.llama_print_system_info().decode().strip(),
        "threads": options.threads,
        "prompt_tokens": options.prompt_tokens,
        "new": options.new,
    }
    best = max(results, key=lambda result: result["tokens_per_s"])
    print(json.dumps(about | {"best": best, "results": results}))


if __name__ == "__main__":
    main()
