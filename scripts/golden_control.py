"""Makes tests/golden/control: a control vector as repeng writes it, and llama.cpp's continuations under it.

    python golden_control.py
    python golden_control.py FILE.gguf      the same continuations under another program's file of that vector

llama.cpp runs a tiny model of tests/golden/gguf with the vector added to the outputs of its blocks. In llama.cpp
`direction.N` is row N - 1 of the buffer that llama_set_adapter_cvec takes, which begins at block 1.

Needs: llama-cpp-python, gguf, numpy.
"""

import ctypes
import json
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
MODEL = GOLDEN / "gguf" / "llama_linear.gguf"
FOLDER = GOLDEN / "control"
PROMPT = [5, 17, 3, 44, 9, 60, 2, 31]
COUNT = 24
# Strength, and the first and last block it acts on.
CASES = [(1.0, 1, 2), (-0.7, 1, 1), (1.5, 2, 2), (0.0, 1, 2)]


def write_vector(path, dim, layers):
    """As repeng's ControlVector.export_gguf."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", layers - 1)
    rows = np.random.default_rng(7).normal(size=(layers, dim)).astype(np.float32)
    for layer in range(1, layers):
        writer.add_tensor(f"direction.{layer}", rows[layer])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_vector(path, dim, layers):
    """(layers - 1, dim), from block 1 on."""
    rows = np.zeros((layers - 1, dim), dtype=np.float32)
    for tensor in gguf.GGUFReader(path).tensors:
        rows[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data
    return rows


def greedy(rows, first, last):
    """Continuation and each token's lead in logits."""
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(MODEL).encode(), params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, params)
    dim = llama_cpp.llama_model_n_embd(model)
    if rows is not None:
        data = np.ascontiguousarray(rows).ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert llama_cpp.llama_set_adapter_cvec(context, data, rows.size, dim, first, last) == 0
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    tokens, margins, step = [], [], list(PROMPT)
    for _ in range(COUNT):
        ids = (ctypes.c_int32 * len(step))(*step)  # the batch only points to them
        batch = llama_cpp.llama_batch_get_one(ids, len(step))
        assert llama_cpp.llama_decode(context, batch) == 0
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(vocab,))
        order = np.argsort(-logits)
        tokens.append(int(order[0]))
        margins.append(float(logits[order[0]] - logits[order[1]]))
        step = tokens[-1:]
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return tokens, margins


def check(rows):
    for line in (FOLDER / "llama.jsonl").read_text().splitlines():
        case = json.loads(line)
        strength, first, last = case["strength"], case["first"], case["last"]
        tokens, _ = greedy(rows * strength if strength else None, first, last)
        same = sum(a == b for a, b in zip(tokens, case["tokens"], strict=True))
        print(f"strength {strength}, blocks {first} to {last}: {same} of {COUNT} tokens are the same")


def main():
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(MODEL).encode(), params)
    dim, layers = llama_cpp.llama_model_n_embd(model), llama_cpp.llama_model_n_layer(model)
    llama_cpp.llama_model_free(model)
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "control.gguf"
    if len(sys.argv) > 1:
        return check(read_vector(sys.argv[1], dim, layers))
    write_vector(path, dim, layers)
    rows = read_vector(path, dim, layers)
    with open(FOLDER / "llama.jsonl", "w") as out:
        for strength, first, last in CASES:
            tokens, margins = greedy(rows * strength if strength else None, first, last)
            print(json.dumps({"prompt": PROMPT, "strength": strength, "first": first, "last": last, "tokens": tokens,
                              "margins": margins}), file=out)  # fmt: skip


if __name__ == "__main__":
    main()
