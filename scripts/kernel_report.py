#!/usr/bin/env python3
"""Writes the generated tables of docs/kernels.md: what ptxas says of every kernel, and what a decode
step of Llama-3.1-8B must move and compute, with the time that follows from a GPU's ceilings.

    scripts/kernel_report.py NVCC

Nothing here is measured on a GPU.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
TARGETS = ["80", "90a"]
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-lineinfo", "-cubin", "-Xptxas=-v", "-Ikernels"]
# One H100 SXM: ceilings that others measured, bf16 products and a copy's reads and writes.
FLOPS, BYTES = 798e12, 3.0e12


def ptxas(nvcc, source, target):
    """{kernel: (registers, shared bytes, spilled bytes)} of one file for one target."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as out:
        arch = f"-gencode=arch=compute_{target},code=sm_{target}"
        command = [nvcc, *FLAGS, arch, source.relative_to(ROOT), "-o", out.name]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(run.stderr)
    if re.search(r"C75\d\d", run.stderr):
        sys.exit(f"{source.name}: ptxas serialises warpgroup products:\n{run.stderr}")
    found, name, spilled = {}, None, 0
    for line in run.stderr.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(match[1]) + int(match[2])
        elif match := re.search(r"Used (\d+) registers(.*)", line):
            shared = re.search(r"(\d+) bytes smem", match[2])
            found[name] = (int(match[1]), int(shared[1]) if shared else 0, spilled)
    return found


def compiled(nvcc):
    sources = sorted((ROOT / "kernels").glob("*.cu"))
    jobs = [(source, target) for target in TARGETS for source in sources]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: ptxas(nvcc, *job), jobs))
    by_target = {target: {} for target in TARGETS}
    for (_, target), found in zip(jobs, results, strict=True):
        by_target[target].update(found)
    rows = ["| kernel | registers sm_80 | registers sm_90a | static shared | spilled |", "|---|--:|--:|--:|--:|"]
    for name in sorted(by_target[TARGETS[0]]):
        old, new = (by_target[target][name] for target in TARGETS)
        rows.append(f"| `{name}` | {old[0]} | {new[0]} | {new[1]} | {old[2] + new[2]} |")
    return rows


def step(batch, shared, own):
    """(operation, calls, bytes, flops) of a decode step of Llama-3.1-8B."""
    dim, heads, kv_heads, head, ffn, vocab, layers = 4096, 32, 8, 128, 14336, 128256, 32
    qkv = (heads + 2 * kv_heads) * head

    def matmul(name, n, k, out):
        return (name, layers, 2 * n * k + 2 * batch * k + out, 2 * batch * n * k)

    tiles = shared // 64 * 64
    positions = tiles + batch * (shared + own - tiles)
    states = 2 * 4 * batch * heads * (head + 2) if tiles else 0
    kv = 2 * 2 * kv_heads * head
    head_bytes = 2 * vocab * dim + 2 * batch * dim + 4 * batch * vocab
    return [
        ("enter", 1, 6 * batch * dim, 0),
        ("residual_norm", 2 * layers + 1, 14 * batch * dim, 0),
        matmul("matmul qkv", qkv, dim, 4 * batch * qkv),
        ("rope_append", layers, batch * (8 * (heads + kv_heads) * head + 8 * kv_heads * head), 0),
        (
            "attention",
            layers,
            positions * kv + states + batch * heads * head * 6,
            4 * batch * (shared + own) * heads * head,
        ),
        matmul("matmul out", dim, heads * head, 4 * batch * dim),
        matmul("gated_matmul gate, up", 2 * ffn, dim, 2 * batch * ffn),
        matmul("matmul down", dim, ffn, 4 * batch * dim),
        ("matmul head", 1, head_bytes, 2 * batch * vocab * dim),
        ("sample", 1, 4 * batch * vocab, 0),
    ]


def predicted(batch, shared, own):
    rows = [
        f"{batch} sequences, {shared} shared positions and {own} of their own:",
        "",
        "| operation | calls | MB a call | GFLOP a call | binds | predicted, all calls |",
        "|---|--:|--:|--:|---|--:|",
    ]
    total = 0.0
    for name, calls, moved, flops in step(batch, shared, own):
        by_bytes, by_flops = moved / BYTES, flops / FLOPS
        seconds = calls * max(by_bytes, by_flops)
        total += seconds
        binds = "products" if by_flops > by_bytes else "memory"
        numbers = f"{moved / 1e6:.2f} | {flops / 1e9:.2f}"
        rows.append(f"| {name} | {calls} | {numbers} | {binds} | {seconds * 1e6:.0f} us |")
    rows.append(f"| **the step** | | | | | **{total * 1e3:.2f} ms** |")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nvcc", help="path of nvcc 13.0")
    args = parser.parse_args()
    tables = {
        "ptxas": compiled(args.nvcc),
        "predicted": [*predicted(1024, 300, 50), "", *predicted(1, 0, 128)],
    }
    text = PAGE.read_text()
    for name, rows in tables.items():
        begin, end = f"<!-- {name} begins -->", f"<!-- {name} ends -->"
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = "\n".join([before + begin, *rows, end]) + after
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
