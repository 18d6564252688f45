"""Times torch's own operations at a model's shapes: what `inkling bench ops` is compared with.

    python torch_ops.py matmul    [--shape llama-3.1-8b] [--rows 256,512]
    python torch_ops.py attention [--shape llama-3.1-8b] [--rows 1024] [--shared 300] [--own 50]

matmul: x (rows, k) times w (n, k) transposed, bf16, for the five matmuls of a layer and the head; and two ceilings, a
device-to-device copy (bytes read plus bytes written) and one large product.
attention: one new token for each of `rows` sequences, whose keys and values, shared ones too, lie in memory once per
sequence. Every way that scaled_dot_product_attention offers is timed; `best` is the fastest one's seconds.

On standard output one JSON object. Times are medians between CUDA events, with 256 MiB read in between, so that
nothing is left in the L2 cache; `spread` is (p90 - p10) / median. `--device cpu --shape tiny` only tries the script.

Needs: torch.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median, quantiles

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

ROWS = (1, 8, 16, 32, 64, 256, 512, 1024, 2048)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
MIB = 2**20


@dataclass
class Shape:
    hidden: int
    inner: int  # width of the gated branch
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    large: int = 8192  # rows and columns of the product that sets the ceiling
    copied: int = 1024 * MIB  # bytes

    def matmuls(self):
        """{name: (n, k)}"""
        attention = self.heads * self.head_dim
        return {
            "qkv": (attention + 2 * self.kv_heads * self.head_dim, self.hidden),
            "out": (self.hidden, attention),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
            "head": (self.vocab, self.hidden),
        }


SHAPES = {
    "llama-3.1-8b": Shape(4096, 14336, 32, 8, 128, 128256),
    "qwen2.5-7b": Shape(3584, 18944, 28, 4, 128, 152064),
    "tiny": Shape(64, 128, 4, 2, 16, 256, large=128, copied=MIB),
}


class Timer:
    """Median seconds of some work, and their spread."""

    def __init__(self, device, seconds):
        self.cuda = device == "cuda"
        self.seconds = seconds  # about so long for each piece of work
        self.flush = torch.ones(256 * MIB // 4 if self.cuda else 1, device=device)

    def once(self, work):
        """Starts the work; the returned function says how long it took, when all is done."""
        self.flush.sum()  # reading leaves no dirty lines that the work would have to write back
        if not self.cuda:
            start = time.perf_counter()
            work()
            took = time.perf_counter() - start
            return lambda: took
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        return lambda: begin.elapsed_time(end) / 1000

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def __call__(self, work):
        for _ in range(3):
            work()
        self.wait()
        start = time.perf_counter()
        self.once(work)
        self.wait()
        repeats = min(max(int(self.seconds / (time.perf_counter() - start)), 10), 200)
        runs = [self.once(work) for _ in range(repeats)]
        self.wait()
        times = [run() for run in runs]
        tenths = quantiles(times, n=10)
        middle = median(times)
        return {"seconds": middle, "spread": (tenths[-1] - tenths[0]) / middle, "repeats": repeats}


def random(device, *size):
    return torch.randn(size, device=device, dtype=torch.bfloat16)


def product(timer, device, rows, n, k):
    x, w = random(device, rows, k), random(device, n, k)
    out = torch.empty(rows, n, device=device, dtype=torch.bfloat16)
    return timer(lambda: torch.matmul(x, w.t(), out=out)) | {"flops": 2 * rows * n * k}


def ceilings(timer, device, shape):
    source = torch.ones(shape.copied, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = timer(lambda: target.copy_(source))
    large = product(timer, device, shape.large, shape.large, shape.large)
    return {
        "copy_bytes_per_s": 2 * shape.copied / copy["seconds"],
        "matmul_flops_per_s": large["flops"] / large["seconds"],
    }


def matmul(timer, options, shape):
    results = []
    for name, (n, k) in shape.matmuls().items():
        for rows in options.rows or ROWS:
            measured = product(timer, options.device, rows, n, k)
            results.append({"op": "matmul", "shape": name, "rows": rows, "n": n, "k": k} | measured)
    return {"ceilings": ceilings(timer, options.device, shape), "results": results}


def attention_ways(device, rows, length, shape):
    """{name: (q, k, v, options)}, three ways to say that each key head serves a group of query heads."""
    group = shape.heads // shape.kv_heads
    q = random(device, rows, shape.heads, 1, shape.head_dim)
    k, v = (random(device, rows, shape.kv_heads, length, shape.head_dim) for _ in range(2))
    yield "gqa", (q, k, v, {"enable_gqa": True})
    # The new token sees every key, so a group's heads can stand as the queries of one head: no mask is needed.
    yield "grouped", (q.reshape(rows, shape.kv_heads, group, shape.head_dim), k, v, {})
    yield "repeated", (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), {})


def attention(timer, options, shape):
    length, results, refused = options.shared + options.own, [], {}
    for rows in options.rows or (1024,):
        kv_bytes = 2 * 2 * rows * shape.kv_heads * length * shape.head_dim
        case = {"op": "attention_prefix", "rows": rows, "shared": options.shared, "own": options.own}
        for way, (q, k, v, named) in attention_ways(options.device, rows, length, shape):
            for backend, kind in BACKENDS.items():
                try:
                    with sdpa_kernel(kind):
                        measured = timer(partial(scaled_dot_product_attention, q, k, v, **named))
                except RuntimeError as error:  # not offered for these shapes or here; or out of memory
                    refused[f"{way} {backend}"] = str(error).splitlines()[0]
                    continue
                results.append(case | {"shape": f"{way} {backend}", "bytes": kv_bytes} | measured)
    if not results:
        raise SystemExit(f"no way of attention works here: {refused}")
    most = max(result["rows"] for result in results)
    best = min(result["seconds"] for result in results if result["rows"] == most)
    return {"best": best, "results": results, "refused": refused}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operation", choices=["matmul", "attention"])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rows", type=lambda text: [int(rows) for rows in text.split(",")])
    parser.add_argument("--shared", type=int, default=300)
    parser.add_argument("--own", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=0.2, help="for each case")
    options = parser.parse_args()

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU")
    torch.manual_seed(0)
    on_gpu = options.device == "cuda"
    about = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "shape": options.shape,
        "model": asdict(SHAPES[options.shape]),
    }
    run = matmul if options.operation == "matmul" else attention
    measured = run(Timer(options.device, options.seconds), options, SHAPES[options.shape])
    print(json.dumps(about | measured))


if __name__ == "__main__":
    main()
