"""Exported linear attention in onnxruntime: our function with its state beside the same formula with scores, interleaved.

    python benchmarks/exported_linear.py FOLDER [--threads 1] [--rounds 7] [--length 4096] [--only causal]

Writes `onnx_linear.md` and `onnx_linear.json` to FOLDER. The shapes were fixed before anything was measured: one row, 8 heads of
64. The yardstick is what PyTorch's exporter makes of the quadratic formula, written as plainly as it can be: scores, their lower
triangle, two products. The state must be 8 times as fast at 4096 tokens.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_compiler as attn
from _tables import markdown, processor, write_json

HEADS, DIM, NEAR, MUST = 8, 64, 64, "8x"
Formula = Callable[[Tensor, Tensor, Tensor], Tensor]
ELU = {"feature": "elu_one"}
FADES = {"feature": "silu", "state": "decay(2 ** (-8 * (h + 1) / heads))", "normalizer": "linear(none)"}
HYBRID = {
    "mix": {
        "how": "shared_denominator",
        "branches": {"near": {"mask": f"causal & window({NEAR})"}, "far": {"mask": f"causal & ~window({NEAR})", **ELU}},
    }
}


def elu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)


def fades(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(q.shape[2])
    slopes = 2.0 ** (-8 * torch.arange(1, HEADS + 1) / HEADS)
    left = torch.exp(-slopes[:, None, None] * (places[:, None] - places).abs())
    return (F.silu(q) @ F.silu(k).mT * left).tril() @ v


def hybrid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(q.shape[2])
    distance = places[:, None] - places
    scores = (q @ k.mT * DIM**-0.5).masked_fill((distance < 0) | (distance >= NEAR), -torch.inf)
    near = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = near + ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril(-NEAR)
    return weights @ v / weights.sum(-1, keepdim=True)


class Quadratic(nn.Module):
    """A formula with all its scores."""

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.formula(q, k, v)


class Softmax(nn.Module):
    """What a policy makes linear."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@dataclass(frozen=True)
class Case:
    """A linear attention, as a policy has it and written out."""

    name: str
    slots: Mapping[str, object]
    formula: Formula


CASES = (Case("causal, elu + 1", ELU, elu), Case("fading, silu", FADES, fades), Case("window 64 + state", HYBRID, hybrid))


def written(case: Case, length: int, folder: Path) -> dict[str, Path]:
    """The yardstick, and our file for this length and for any."""
    inputs = tuple(torch.randn(3, 1, HEADS, length, DIM))
    shapes = tuple({2: torch.export.Dim("length", min=2, max=1 << 16)} for _ in inputs)
    paths = {name: folder / f"{case.formula.__name__}.{name}.onnx" for name in ("quadratic", "ours", "any length")}
    program = torch.onnx.export(Quadratic(case.formula).eval(), inputs, dynamo=True, opset_version=24, verbose=False)
    assert program is not None
    program.save(paths["quadratic"])
    policy = {"version": 1, "rules": [{"match": {}, "attn": dict(case.slots)}]}
    attn.export_onnx(Softmax().eval(), inputs, paths["ours"], policy)
    attn.export_onnx(Softmax().eval(), inputs, paths["any length"], policy, dynamic_shapes=shapes)
    return paths


def measured(case: Case, length: int, folder: Path, threads: int, rounds: int) -> dict[str, object]:
    """One row of the table: the best of so many rounds, in which each has its turn."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    generator = torch.Generator().manual_seed(0)
    feeds = dict(zip("qkv", (x.numpy() for x in torch.randn(3, 1, HEADS, length, DIM, generator=generator)), strict=True))
    sessions = {name: onnxruntime.InferenceSession(path, options) for name, path in written(case, length, folder).items()}
    found = {name: session.run(None, feeds)[0] for name, session in sessions.items()}
    best = dict.fromkeys(sessions, float("inf"))
    for _ in range(rounds):
        for name, session in sessions.items():
            begin = time.perf_counter()
            session.run(None, feeds)
            best[name] = min(best[name], time.perf_counter() - begin)
    apart = max(float(np.abs(found["quadratic"] - x).max()) for x in found.values())
    milliseconds = {f"{name} ms": f"{1e3 * seconds:.2f}" for name, seconds in best.items()}
    ratios = {f"{name} over quadratic": f"{best['quadratic'] / best[name]:.1f}x" for name in ("ours", "any length")}
    return {"attention": case.name, "tokens": length, **milliseconds, **ratios, "must": MUST, "apart": f"{apart:.0e}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if given.only in case.name:
                rows.append(measured(case, given.length, Path(folder), given.threads, given.rounds))
                print(*rows[-1].values(), sep="  ", flush=True)
    title = f"onnxruntime {onnxruntime.__version__} on {processor()}, {given.threads} thread{'s' * (given.threads > 1)}"
    (given.folder / "onnx_linear.md").write_text(f"{title}\n\n{markdown(rows)}")
    write_json(given.folder / "onnx_linear.json", {"onnxruntime": onnxruntime.__version__, "rows": rows})


if __name__ == "__main__":
    main()
