"""Plants faults in the kernels and requires that the tests notice each.

    python planted_faults.py --list                 are all faults' texts still found, each once? Builds nothing
    python planted_faults.py TARGET_DIR [WORD...]   plants all, or those whose file or name contains one of the words

TARGET_DIR keeps a copy of the tree and its build, so that the next time is quicker; nothing else is written. A fault is
noticed if a test fails, the shim stops the run, or it takes longer than --limit seconds, in the usual order of threads,
reversed, or shuffled (SHIM_ORDER). Faults whose tests run none of each other's kernels share a build. Exit code 1: a
fault went unnoticed or could not be planted.

Kernels run on the processor (feature host-kernels): a compiler for C++ is needed, no GPU. With ccache it is quicker.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORDERS = ["forward", "reverse", "7"]
BINARIES = ["operations", "sampling"]


@dataclass
class Fault:
    file: str   # in kernels/
    name: str   # what is wrong
    old: str    # found once in the file
    new: str
    binary: str
    tests: str  # part of the tests' names


ATTENTION = ("operations", "attention::")
MATMUL = ("operations", "matmul::")
EXPERTS = ("operations", "experts::")
STREAM = ("operations", "stream::")
HEADS = ("operations", "heads::")
LOGITS = ("operations", "logits::")
PTX = ("operations", "ptx::")
PROBE = ("operations", "probe::")
SAMPLING = ("sampling", "")

# What the tests of other files' faults run too: a fault here has a build of its own.
SHARED = {"device.cuh", "fill_weight.cu", "math.cuh", "operations.cuh", "ptx.cuh", "select.cuh"}

FAULTS = [Fault(*fault, *tests) for tests, faults in [
    (ATTENTION, [
        ("attention.cu", "the page before is read",
         "table[block] : 0;", "table[block > 0 ? block - 1 : 0] : 0;"),
        ("attention.cu", "a window is one position too long",
         "visible.last[half] - p.window + 1 : 0;", "visible.last[half] - p.window : 0;"),
        ("attention.cu", "a prefix is folded one tile too far",
         "const int end = item.prefix ? shared_tiles :", "const int end = item.prefix ? shared_tiles + 1 :"),
        ("attention.cu", "keys are read before they have arrived",
         "        cp_async_wait<AHEAD>();\n        block_barrier<WARPS>();\n        float scores", "        float scores"),
        ("attention.cu", "keys are overwritten while other warps read them",
         "        score_tile<HD>(scores, q, k);\n        block_barrier<WARPS>();\n",
         "        score_tile<HD>(scores, q, k);\n"),
        ("attention.cu", "values are overwritten while other warps read them",
         "        add_values<HD>(state, weights, v);\n        block_barrier<WARPS>();\n",
         "        add_values<HD>(state, weights, v);\n"),
        ("attention.cu", "the last tile is missing where it has one position",
         "item.last / TILE + 1;", "(item.last + TILE - 1) / TILE;"),
        ("attention.cu", "the row's own position is not copied",
         "block * PAGE + row <= last;", "block * PAGE + row < last;"),
        ("attention.cu", "a finished chunk of a prefix is dropped",
         "resumed && shared_tiles >= CHUNK_TILES;", "resumed && shared_tiles > CHUNK_TILES;"),
        ("attention.cu", "all warps have the first one's rows",
         "const uint32_t i = warp * per_warp + turn;", "const uint32_t i = turn;"),
        ("attention_fold.cuh", "chunks are merged without rescaling",
         "const float earlier = exp_f32(head.x - base), later", "const float earlier = 1.0f, later"),
        ("attention_fold.cuh", "the sum is not rescaled when the maximum grows",
         "state.sum[half] * keep[half] + sum;", "state.sum[half] + sum;"),
        ("attention_fold.cuh", "the row's own position is masked",
         "position <= visible.last[half];", "position < visible.last[half];"),
        ("attention_fold.cuh", "half 1 is scaled with half 0's factor",
         "*= keep[e / 2];", "*= keep[e % 2];"),
        ("attention_fold.cuh", "capped scores lose their sign",
         "return copysignf((1.0f - t) * inverse, x);", "return (1.0f - t) * inverse;"),
        ("copy_pages.cu", "half a page is copied",
         "const int chunks = p.page_len / 8,", "const int chunks = p.page_len / 16,"),
        ("copy_pages.cu", "source and target are exchanged",
         "from = p.pairs[2 * blockIdx.x], to = p.pairs[2 * blockIdx.x + 1];",
         "from = p.pairs[2 * blockIdx.x + 1], to = p.pairs[2 * blockIdx.x];"),
        ("rope_append.cu", "values are turned too",
         "is_qk = works && head < first_v;", "is_qk = works && head < all;"),
        ("rope_append.cu", "keys are normalised by the width of the queries",
         "is_k ? p.k_width : p.q_width;\n    const float* norm", "p.q_width;\n    const float* norm"),
        ("rope_append.cu", "whole norms of a part of the row",
         "squares = block_sum(squares, scratch);", "squares = warp_sum(squares);"),
        ("rope_append.cu", "turned the other way",
         "const float low = a * cos - b * sin;", "const float low = a * cos + b * sin;"),
        ("rope_append.cu", "the page after",
         "p.tables[blocks + position / PAGE];", "p.tables[blocks + (position + 1) / PAGE];"),
        ("rope_append.cu", "another layer's pages",
         "* p.layers + p.layer) * p.blocks;", "* p.layers + p.layer - 1) * p.blocks;"),
    ]),
    (MATMUL, [
        ("matmul.cu", "a gated product that is not gated",
         "PRODUCT(gated_mma_64x16, mma_matmul, Mma64x16, true, 2)",
         "PRODUCT(gated_mma_64x16, mma_matmul, Mma64x16, false, 2)"),
        ("matmul_epilogue.cuh", "a row beyond the last is written",
         "block * 8 + odd >= p.rows) return;", "block * 8 + odd > p.rows) return;"),
        ("matmul_epilogue.cuh", "the lower half's bias for both",
         "acc[d] += d % 4 < 2 ? low : high;", "acc[d] += low;"),
        ("matmul_epilogue.cuh", "the last group of tiles is taken for a whole one",
         "const int height = min(GROUP, token_blocks - first);", "const int height = GROUP;"),
        ("matmul_epilogue.cuh", "a square in gelu instead of a cube",
         "0.044715f * linear * linear * linear)", "0.044715f * linear * linear)"),
        ("matmul_mma.cuh", "a stage is read before it has arrived",
         "cp_async_wait<Shape::STAGES - 2>();", "cp_async_wait<Shape::STAGES - 1>();"),
        ("matmul_mma.cuh", "other threads' parts of a stage are not waited for",
         "            __syncthreads();                      // everybody's", "            // everybody's"),
        ("matmul_mma.cuh", "a stage is released one step early",
         "const int next = k + Shape::STAGES - 1;", "const int next = k + Shape::STAGES;"),
        ("matmul_mma.cuh", "the last k tile is missing",
         "        for (int k = 0; k < p.k_tiles; k++) {\n            cp_async_wait",
         "        for (int k = 0; k < p.k_tiles - 1; k++) {\n            cp_async_wait"),
        ("matmul_mma.cuh", "the next tile is loaded while others read the ring",
         "        __syncthreads();   // the ring is free", "        // the ring is free"),
        ("matmul_mma.cuh", "gated output is stored before it is all staged",
         "            __syncthreads();\n            store_gated", "            store_gated"),
        ("matmul_wgmma.cuh", "the producer waits for the wrong phase",
         "at.parity ^ 1);", "at.parity);"),
        ("matmul_wgmma.cuh", "the wrong stage is released",
         "if (k > 0 && speaks) mbarrier_arrive(&ring.empty[previous]);",
         "if (k > 0 && speaks) mbarrier_arrive(&ring.empty[at.stage]);"),
        ("matmul_wgmma.cuh", "sums are used before they are there",
         "        wgmma_wait<0>();\n        wgmma_complete(acc);", "        wgmma_complete(acc);"),
        ("matmul_wgmma.cuh", "x of the next rows instead of the next k",
         "x += static_cast<int64_t>(p.row_groups) * ATOM_ELEMENTS;", "x += ATOM_ELEMENTS;"),
        ("matmul_wgmma.cuh", "a slice of k is multiplied twice",
         "wgmma_advance(x, bytes));", "wgmma_advance(x, bytes & 64));"),
        ("matmul_wgmma.cuh", "gated output is stored before it is all staged",
         "            named_barrier(1 + team, TEAM);\n            store_gated", "            store_gated"),
        ("matmul_wgmma.cuh", "the second team has the first one's weights",
         "bulk_copy(ring.weight(at.stage) + team * TILE_ELEMENTS, weight + team * tile_row,",
         "bulk_copy(ring.weight(at.stage) + team * TILE_ELEMENTS, weight,"),
    ]),
    (EXPERTS, [
        ("experts.cu", "an expert is chosen twice",
         "if ((j == 0 || rank < last) && rank > best)", "if ((j == 0 || rank <= last) && rank > best)"),
        ("experts.cu", "the sum of one logit a lane",
         "        for (int id = lane; id < p.experts; id += WARP) total +=",
         "        for (int id = lane; id < min(p.experts, WARP); id += WARP) total +="),
        ("experts.cu", "the chosen's weights are not normalised",
         "warp_sum(p.normalise ? weight : total);", "warp_sum(p.normalise ? weight * weight : total);"),
        ("experts.cu", "pairs are counted before the counts are zero",
         "counts[id] = 0;\n    __syncthreads();\n", "counts[id] = 0;\n"),
        ("experts.cu", "counts are read before they are complete",
         "    __syncthreads();\n\n    const Extent blocks", "    const Extent blocks"),
        ("experts.cu", "an expert's last block is not counted",
         "const int blocks = (counts[id] + p.tokens - 1) / p.tokens;", "const int blocks = counts[id] / p.tokens;"),
        ("experts.cu", "a warp's pairs go where the first one's do",
         "for (int w = 0; w < warp; w++) at +=", "for (int w = 0; w < warp / WARP; w++) at +="),
        ("experts.cu", "pairs of a warp go to one place",
         "at + __popc(ballot & ((1u << lane) - 1));", "at;"),
        ("experts.cu", "only an expert's first block gets its weight",
         "p.blocks[1 + blocks.first + i] = expert;", "p.blocks[1 + blocks.first] = expert;"),
        ("experts.cu", "the first expert's weight for all",
         "const float weight = weights[j];", "const float weight = weights[0];"),
        ("matmul_epilogue.cuh", "a block has its neighbour's weight",
         "p.weights[p.blocks[1 + token / TOKENS]]", "p.weights[p.blocks[token / TOKENS > 0 ? token / TOKENS : 1]]"),
        ("matmul_mma.cuh", "all blocks have the first one's weight",
         "weight_of<Shape::TOKENS>(p, tile.token);", "weight_of<Shape::TOKENS>(p, 0);"),
        ("matmul_wgmma.cuh", "all blocks have the first one's weight",
         "weight_of<Shape::TOKENS>(p, tile.token)", "weight_of<Shape::TOKENS>(p, 0)"),
    ]),
    (STREAM, [
        ("enter.cu", "the swizzle is forgotten",
         "(k % 64 / 8) ^ static_cast<int>(token % 8);", "k % 64 / 8;"),
        ("enter.cu", "a dead row is filled",
         "    if (kind == DEAD) return;\n", ""),
        ("enter.cu", "an embedding's last component is not scaled",
         "p.scale * high_bf16(v.y)", "high_bf16(v.y)"),
        ("enter.cu", "no token reads as the first one",
         "value < vocab ? value : vocab - 1;", "value < vocab ? value : 0;"),
        ("enter.cu", "the drawn slot is taken for the token",
         "    if (kind == DRAWN) value = p.last[value];\n", "    if (kind == DRAWN) value = value + 0;\n"),
        ("select_rows.cu", "the last 64 columns are missing",
         "chunk < p.chunks; chunk", "chunk < p.chunks - 8; chunk"),
        ("select_rows.cu", "out is addressed as x",
         "tile_chunk(to, chunk, p.out_row_groups)", "tile_chunk(to, chunk, p.x_row_groups)"),
        ("device.cuh", "tiles are not swizzled",
         "((chunk % 8) ^ (row % 8)) * 8;", "(chunk % 8) * 8;"),
        ("operations.cuh", "a window is one position too long",
         "it.from <= position && position < it.to", "it.from <= position && position <= it.to"),
        ("operations.cuh", "partial sums are read before they are written",
         "= values), ...);\n            __syncthreads();\n", "= values), ...);\n"),
        ("residual_norm.cu", "found captures are read before they are written",
         "scratch->found[warp] = at;\n            }\n            __syncthreads();\n",
         "scratch->found[warp] = at;\n            }\n"),
        ("operations.cuh", "the row's own captures are passed over",
         "entries[at].x < static_cast<uint32_t>(row);", "entries[at].x <= static_cast<uint32_t>(row);"),
        ("operations.cuh", "the row's norm is no factor",
         "float add = op.scale * size;", "float add = op.scale;"),
        ("operations.cuh", "an operation's norm is from before the one ahead of it",
         "squares = {after, true};", "squares = {before, true};"),
        ("residual_norm.cu", "a branch with a norm is not scaled",
         "const float factor = p.branch_scale * inverse_norm(",
         "const float factor = inverse_norm("),
        ("residual_norm.cu", "a branch is scaled by its square",
         "branch[v].w * factor};\n                });",
         "branch[v].w * factor * factor};\n                });"),
        ("residual_norm.cu", "the stream's norm is the branch's",
         "            squares = sum_of_squares(h);\n",
         "            squares = OF_BRANCH ? scratch->partial[OF_BRANCH_SQUARES][0][0] : sum_of_squares(h);\n"),
        ("residual_norm.cu", "the branch is captured after it is added",
         "if (p.has_captures) capture(1, found, branch);", "if (p.has_captures) capture(1, found, h);"),
    ]),
    (("operations", "hooks::"), [
        ("operations.cuh", "sums of operations are overwritten while others read them",
         "if (THREADS > WARP && op + 1 < ops) __syncthreads();", ""),
        ("operations.cuh", "a coordinate below its bounds is left alone",
         "fminf(fmaxf(c, op.low * size), op.high * size)", "fminf(c, op.high * size)"),
        ("operations.cuh", "bounds are no part of the row's norm",
         "op.low * size), op.high * size)", "op.low), op.high)"),
        ("operations.cuh", "a norm is kept without its root",
         "squares.sum * inverse_root(squares.sum) * inverse_root(after)", "squares.sum * inverse_root(after)"),
        ("operations.cuh", "every other row of a window is none of it",
         "(position - it.from) % it.every == 0", "(position - it.from) % it.every != 1"),
        ("operations.cuh", "a condition outside its window keeps what another row met",
         "met = (met & ~(1u << it.gate)) |", "met = (seen ? met & ~(1u << it.gate) : met) |"),
        ("operations.cuh", "a condition latches at the last row that meets it",
         "atomicMin(p.latched", "atomicExch(p.latched"),
        ("operations.cuh", "a latched condition holds for rows before it",
         "it.gate] <= position", "it.gate] != NONE"),
        ("operations.cuh", "the share of the stream is its coordinate",
         "if (relative) c *= inverse_root(squares.sum);", ""),
        ("residual_norm.cu", "operations on the branch are on the stream",
         "+ 2 * p.site + 2];", "+ 2 * p.site + 1];"),
    ]),
    (HEADS, [
        ("heads.cu", "every head is changed by an operation on one",
         "return it.head == static_cast<uint32_t>(head);", "return it.head >= 0;"),
        ("heads.cu", "what was changed is not put back",
         "uint2{pack_bf16(h[v].x, h[v].y), pack_bf16(h[v].z, h[v].w)};", "*reinterpret_cast<uint2*>(output(head, element));"),
        ("heads.cu", "keys are counted from the first query",
         "of == 1 ? p.heads : p.heads + p.kv_heads;", "of == 1 ? 0 : p.heads + p.kv_heads;"),
        ("heads.cu", "values are captured as keys",
         "head < p.heads + p.kv_heads ? 1 : 2;", "head < p.heads + p.kv_heads ? 1 : 1;"),
        ("heads.cu", "a captured head stands where the first one does",
         "capture(tap, head * p.dim, h);", "capture(tap, 0, h);"),
        ("heads.cu", "rows of the bank are as long as a head",
         "return model_dim;", "return dim;"),
        ("operations.cuh", "every position has the first one's vector",
         "it.flags & BY_POSITION ? (position - it.from) / it.every : 0;", "it.flags & BY_POSITION ? 0 : 0;"),
    ]),
    (LOGITS, [
        ("cap_logits.cu", "the cap forgets the sign",
         "copysignf(p.cap * ((1.0f - small) / (1.0f + small)), y);", "p.cap * ((1.0f - small) / (1.0f + small));"),
        ("cap_logits.cu", "the last logit is left out",
         "i < p.count; i += step", "i + 1 < p.count; i += step"),
        ("summarize.cu", "the entropy's sign",
         "log(sum) - product / sum", "log(sum) + product / sum"),
        ("summarize.cu", "of ties at the boundary one is missing",
         "key == boundary.key && id <= last_tied);", "key == boundary.key && id < last_tied);"),
        ("summarize.cu", "counting begins before the count is zero",
         "if (threadIdx.x == 0) s.found = 0;\n    __syncthreads();", "if (threadIdx.x == 0) s.found = 0;"),
        ("summarize.cu", "ranks are sorted before all are there",
         "= rank;\n    });\n    __syncthreads();", "= rank;\n    });"),
        ("select.cuh", "bins are counted before they are zero",
         "s.low[bin] = s.high[bin] = 0;\n        __syncthreads();", "s.low[bin] = s.high[bin] = 0;"),
        ("select.cuh", "the boundary is one too late",
         "if (reached < goal && goal <= reached + bin_sum[i])", "if (reached <= goal && goal < reached + bin_sum[i])"),
        ("select.cuh", "the last ids of a ragged vocabulary are missing",
         "return (vocab + 3) / 4;", "return vocab / 4;"),
        ("select.cuh", "of equal logits the higher id is better",
         "return static_cast<uint64_t>(total_key(logit)) << 32 | static_cast<uint32_t>(~id);",
         "return static_cast<uint64_t>(total_key(logit)) << 32 | id;"),
    ]),
    (SAMPLING, [
        ("sample.cu", "ties go to the higher id",
         "other == score && other_id < id", "other == score && other_id > id"),
        ("sample.cu", "the k-th entry is filtered out",
         "const bool kept = logit >= least &&", "const bool kept = logit > least &&"),
        ("sample.cu", "top-p keeps all",
         "    kept.key = boundary.key;\n    if (wanted", "    if (wanted"),
        ("sample.cu", "min-p knows no temperature",
         "static_cast<double>(max / draw.temperature)", "static_cast<double>(max)"),
        ("sample.cu", "the race is pruned too much",
         "2e-3f - b);", "-1.0f - b);"),
        ("sample.cu", "the last token is kept for no slot",
         "if (draw.to != NONE) p.last[draw.to] = token;", "if (draw.to == 0) p.last[draw.to] = token;"),
        ("philox.cuh", "nine rounds instead of ten",
         "round < 10;", "round < 9;"),
        ("philox.cuh", "halves of a product are exchanged",
         "c3 = static_cast<uint32_t>(a);", "c3 = static_cast<uint32_t>(a >> 32);"),
    ]),
    (PTX, [
        ("ptx.cuh", "rows and columns of mma's left operand are exchanged",
         "const int row = g + 8 * (i % 2), k = 2 * q + 8 * (i / 2);",
         "const int row = g + 8 * (i / 2), k = 2 * q + 8 * (i % 2);"),
        ("ptx.cuh", "ldmatrix's low half is not transposed",
         "low = transposed ? m[2 * q][g] : m[g][2 * q];", "low = m[g][2 * q];"),
        ("ptx.cuh", "an invalid copy is made",
         "shim::copy_async(smem, global, valid);", "shim::copy_async(smem, global, true);"),
        ("device.cuh", "a block's sum is written over one that is still read",
         "    __syncthreads();   // an earlier use", "    // an earlier use"),
        ("math.cuh", "e^-infinity is not 0",
         "return x < -87.3f ? 0.0f : y * power;", "return y * power;"),
        ("math.cuh", "a product of ln is rounded before it is added",
         "p = fmaf(p, m, 2.0000714765e-1f);", "p = p * m + 2.0000714765e-1f;"),
        ("fill_weight.cu", "the swizzle is forgotten",
         "(static_cast<int>(i % 8) ^ (row % 8)) * 8;", "static_cast<int>(i % 8) * 8;"),
        ("fill_weight.cu", "both of a pair are the same",
         "normal(static_cast<uint32_t>(word >> 32));", "normal(static_cast<uint32_t>(word));"),
    ]),
    (("operations", "ptx::cp_async"), [
        ("probes.cu", "a copy is read before it has arrived",
         "        cp_async_wait<1>();\n", "        cp_async_wait<2>();\n"),
        ("probes.cu", "other threads' copies are not waited for",
         "        __syncthreads();   // everyone's part", "        // everyone's part"),
    ]),
    (("operations", "ptx::wgmma"), [
        ("probes.cu", "a stage is never released",
         "        mbarrier_arrive(empty + s);\n", ""),
    ]),
    (PROBE, [
        ("probe.cu", "the last elements are missing",
         "chunk < p.dim / 4;", "chunk < p.dim / 4 - 1;"),
        ("probe.cu", "the norm's square",
         "i < probes ? dot : sqrtf(dot);", "dot;"),
        ("probe.cu", "outputs overlap",
         "static_cast<int64_t>(item.out) + i", "static_cast<int64_t>(item.out) / 2 + i"),
        ("probe.cu", "a place is taken for a row",
         "static_cast<int64_t>(item.row) * p.dim", "static_cast<int64_t>(blockIdx.x) * p.dim"),
        ("probe.cu", "every item has the first vectors",
         "(static_cast<int64_t>(item.first) + i) * p.dim", "static_cast<int64_t>(i) * p.dim"),
    ]),
] for fault in faults]


def check_texts(root: Path) -> list[str]:
    """What is wrong with the list itself."""
    problems = []
    tests = "".join(path.read_text() for path in sorted((root / "tests").rglob("*.rs")))
    for fault in FAULTS:
        path = root / "kernels" / fault.file
        count = path.read_text().count(fault.old) if path.is_file() else 0
        if count != 1:
            problems.append(f"{fault.file}: {fault.name}: its text is found {count} times:\n    {fault.old!r}")
        if fault.old == fault.new:
            problems.append(f"{fault.file}: {fault.name}: changes nothing")
        module, _, test = fault.tests.partition("::")
        if fault.tests and (f"mod {module};" not in tests or f"fn {test}" not in tests):
            problems.append(f"{fault.file}: {fault.name}: no tests {fault.tests}")
    planted = {fault.file for fault in FAULTS}
    files = {path.name for path in (root / "kernels").iterdir() if path.suffix in (".cu", ".cuh")}
    problems += [f"{name}: no fault is planted there" for name in sorted(files - planted)]
    names = [(fault.file, fault.name) for fault in FAULTS]
    problems += [f"{name}: two faults of one name" for name in {n for n in names if names.count(n) > 1}]
    return problems


class Tree:
    """A copy of the tree, and its tests."""

    def __init__(self, target: Path, limit: float):
        if ROOT in target.parents and ROOT / "target" not in target.parents:
            raise SystemExit(f"{target} is in the tree that is copied there: choose one in target/, or outside")
        self.root = target / "tree"
        self.limit = limit
        target.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.root, ignore_errors=True)
        unwanted = shutil.ignore_patterns("target", ".git", "runs", "__pycache__", ".ruff_cache")
        shutil.copytree(ROOT, self.root, ignore=unwanted, symlinks=True)
        # What is in the build may be of a fault: every kernel is newer than that.
        for path in (self.root / "kernels").rglob("*"):
            os.utime(path)
        # No GPU takes part: a compiler that does not run is as good as none, and takes no time.
        stub = target / "no-nvcc" / "nvcc"
        stub.parent.mkdir(exist_ok=True)
        stub.write_text("#!/bin/sh\nexit 1\n")
        stub.chmod(0o755)
        gone = ("NVCC", "CUDA_HOME", "REQUIRE_GPU", "SHIM_ORDER")
        self.env = {name: value for name, value in os.environ.items() if name not in gone}
        self.env["PATH"] = f"{stub.parent}{os.pathsep}{self.env['PATH']}"
        self.env["CARGO_TARGET_DIR"] = str(target / "build")
        self.env["CARGO_INCREMENTAL"] = "1"
        if shutil.which("ccache") and "CXX" not in self.env:
            self.env["CXX"] = "ccache c++"

    def build(self) -> dict[str, str]:
        """The test binaries; on failure ends with what the compiler says."""
        command = ["cargo", "test", "--release", "--locked", "--features", "host-kernels", "--no-run"]
        for binary in BINARIES:
            command += ["--test", binary]
        run = subprocess.run(command, cwd=self.root, env=self.env, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stderr[-3000:])
        found = re.findall(r"Executable tests/(\w+)(?:/main)?\.rs \((.*)\)", run.stderr)
        binaries = {name: str(self.root / path) for name, path in found}
        if set(binaries) != set(BINARIES):
            raise RuntimeError(f"cargo names these tests: {binaries}")
        return binaries

    def run(self, executable: str, tests: str, order: str) -> str | None:
        """How the tests fail, None if they pass."""
        command = [executable, "--test-threads", str(os.cpu_count() or 1)] + ([tests] if tests else [])
        env = self.env | {"SHIM_ORDER": order, "RUST_BACKTRACE": "0"}
        try:
            run = subprocess.run(command, cwd=self.root, env=env, capture_output=True, timeout=self.limit)
        except subprocess.TimeoutExpired:
            return f"runs longer than {self.limit:.0f} s"
        output = (run.stdout + run.stderr).decode(errors="replace")
        if run.returncode == 0:
            if " 0 passed" in output:
                raise RuntimeError(f"no test is named {tests}")
            return None
        return symptom(output, run.returncode)


def symptom(output: str, code: int) -> str:
    """The line that says most about a failure."""
    lines = output.splitlines()
    for at, line in enumerate(lines):
        if line.startswith("shim: "):
            return line[:120]
        if " panicked at " in line and at + 1 < len(lines):
            return lines[at + 1][:120]
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def has_own_build(fault: Fault) -> bool:
    # A mixture's tests run the kernels of matmul and select_rows too.
    return fault.file in SHARED or (fault.binary, fault.tests) == EXPERTS


def batches(faults: list[Fault]) -> list[list[Fault]]:
    """Those that share a build: at most one for each set of tests."""
    alone = [[fault] for fault in faults if has_own_build(fault)]
    queues: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        if not has_own_build(fault):
            queues.setdefault((fault.binary, fault.tests), []).append(fault)
    shared = [[fault for fault in some if fault] for some in zip_longest(*queues.values())]
    return shared + alone


def plant(tree: Tree, faults: list[Fault]) -> dict[str, str]:
    """The tests with these faults; the tree is clean again on return."""
    paths = [tree.root / "kernels" / fault.file for fault in faults]
    clean = {path: path.read_text() for path in paths}
    for path, fault in zip(paths, faults):
        path.write_text(path.read_text().replace(fault.old, fault.new))
    try:
        return tree.build()
    finally:
        for path, text in clean.items():
            path.write_text(text)   # newer than the build that has the fault


def notice(tree: Tree, binaries: dict[str, str], fault: Fault) -> tuple[str, str]:
    """(order in which it is noticed, how); the order is empty if it is not."""
    for order in ORDERS:
        if how := tree.run(binaries[fault.binary], fault.tests, order):
            return order, how
    return "", "UNNOTICED"


def try_batch(tree: Tree, faults: list[Fault]) -> list[tuple[Fault, str, str]]:
    try:
        binaries = plant(tree, faults)
    except RuntimeError as error:
        if len(faults) == 1:
            return [(faults[0], "", f"DOES NOT BUILD: {error}")]
        return [result for fault in faults for result in try_batch(tree, [fault])]
    return [(fault, *notice(tree, binaries, fault)) for fault in faults]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", type=Path, metavar="TARGET_DIR")
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--list", action="store_true", help="only check the faults' texts")
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="of one run of tests (default 900)")
    options = parser.parse_args()
    if problems := check_texts(ROOT):
        print("\n".join(problems), file=sys.stderr)
        return 1
    if options.list:
        print(f"{len(FAULTS)} faults in {len({fault.file for fault in FAULTS})} files")
        return 0
    if options.target is None:
        parser.error("TARGET_DIR is missing")
    wanted = [fault for fault in FAULTS
              if not options.words or any(word in f"{fault.file} {fault.name}" for word in options.words)]
    if not wanted:
        parser.error(f"no fault is named {' or '.join(options.words)}")

    begin = time.monotonic()
    tree = Tree(options.target.resolve(), options.limit)
    binaries = tree.build()
    print(f"clean build: {time.monotonic() - begin:.0f} s", flush=True)
    for binary, tests in sorted({(fault.binary, fault.tests) for fault in wanted}):
        for order in ORDERS:
            if how := tree.run(binaries[binary], tests, order):
                print(f"without a fault {binary} {tests} fails, order {order}: {how}", file=sys.stderr)
                return 1
    print(f"clean tests pass in every order: {time.monotonic() - begin:.0f} s\n", flush=True)

    noticed = 0
    print(f"{'file':<20} {'fault':<58} {'order':<8} noticed by")
    for batch in batches(wanted):
        for fault, order, how in try_batch(tree, batch):
            noticed += bool(order)
            print(f"{fault.file:<20} {fault.name:<58} {order or '-':<8} {how}", flush=True)
    print(f"\n{noticed} of {len(wanted)} faults were noticed, in {time.monotonic() - begin:.0f} s")
    return 0 if noticed == len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
