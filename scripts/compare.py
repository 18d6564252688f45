"""Compares two files of captured tensors: what was got against what was wanted.

    python compare.py GOT WANT [--rel 5e-5] [--logits-rel 1e-4]
    python compare.py GOT WANT --not-worse-than OTHER

A tensor's error is that of its worst row, ||got - want|| / ||want||: over a whole tensor the first row, often a
hundred times longer than the others, would hide them. For logits the mean KL divergence and how often the most
likely token agrees are shown as well. The first form exits with 1 when a tensor is missing, misshapen, not finite
or over its limit. The second does when the mean over tensors of that error, or the mean KL of the logits, exceeds
OTHER's: say transformers' own bf16 answer, where WANT is in f32.

Needs: torch, safetensors.
"""

import argparse
import sys
from dataclasses import dataclass
from math import inf

import torch
from safetensors.torch import load_file


@dataclass
class Difference:
    row: float  # the worst row's relative error; inf where nothing can be compared
    kl: float | None = None  # mean over rows, nats; logits only
    agree: float | None = None  # share of rows with the same most likely token; logits only


def is_logits(name):
    return name.endswith("/logits")


def difference(name, got, want):
    """The Difference of one tensor, and why it can't be compared, if so."""
    if got is None:
        return Difference(inf), "missing"
    if got.shape != want.shape:
        return Difference(inf), f"misshapen {tuple(got.shape)}, not {tuple(want.shape)}"
    got, want = got.double(), want.double()
    if not got.isfinite().all():
        return Difference(inf), "not finite"
    row = ((got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-30)).max().item()
    if not is_logits(name):
        return Difference(row), None
    log_got, log_want = got.log_softmax(-1), want.log_softmax(-1)
    kl = (log_want.exp() * (log_want - log_got)).sum(-1).mean().item()
    agree = (got.argmax(-1) == want.argmax(-1)).double().mean().item()
    return Difference(row, kl, agree), None


def compare(path, want):
    """{name: Difference} of a file against the tensors `want`."""
    got, found = load_file(path), {}
    for name in sorted(want):
        found[name], problem = difference(name, got.get(name), want[name])
        if problem:
            print(f"{name}: {problem}")
    return found


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def summary(found):
    """(mean of the worst rows, mean KL)."""
    return mean(d.row for d in found.values()), mean(d.kl for d in found.values() if d.kl is not None)


def within(found, rel, logits_rel):
    """Prints what is over its limit, and all logits; True when nothing is over."""
    over = 0
    for name, d in found.items():
        bad = not d.row <= (logits_rel if is_logits(name) else rel)
        over += bad
        if bad or d.kl is not None:
            extra = "" if d.kl is None else f"  top-1 {d.agree:.3f}  KL {d.kl:.2e}"
            print(f"{name}: worst row {d.row:.2e}{extra}{'  <-- over' if bad else ''}")
    print(f"{len(found)} tensors, {over} over, worst row {max(d.row for d in found.values()):.2e}")
    return over == 0


def not_worse(mine, other):
    (row, kl), (other_row, other_kl) = summary(mine), summary(other)
    print(
        f"{len(mine)} tensors, mean worst-row error {row:.2e} against {other_row:.2e}, "
        f"logits KL {kl:.2e} against {other_kl:.2e}"
    )
    return row <= other_row and kl <= other_kl


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("got")
    parser.add_argument("want")
    parser.add_argument("--rel", type=float, default=5e-5)
    parser.add_argument("--logits-rel", type=float, default=1e-4)
    parser.add_argument("--not-worse-than", metavar="OTHER")
    options = parser.parse_args()

    want = load_file(options.want)
    mine = compare(options.got, want)
    if options.not_worse_than:
        good = not_worse(mine, compare(options.not_worse_than, want))
    else:
        good = within(mine, options.rel, options.logits_rel)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
