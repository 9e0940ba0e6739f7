"""Exported attentions in onnxruntime: our functions beside what PyTorch's exporter writes by itself, interleaved in one process.

    python benchmarks/exported.py FOLDER [--threads 1] [--rounds 7] [--only window] [--strategy auto]

Writes `onnx.md` and `onnx.json` to FOLDER. The shapes were fixed before anything was measured: one row, 8 heads of 64. The
yardstick is one `Attention` of opset 24 with the mask as the model wrote it, made while the model runs where lengths change.
Ours is the same model, its mask recovered. Where the mask is a causal window, onnxruntime's own GroupQueryAttention, which has
one, stands beside both. Linear attention stands beside the softmax that it takes the place of, with gates and deltas as inputs;
it is compared with PyTorch's operators.
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
from _group_query import write_group_query
from _tables import markdown, processor, write_json

HEADS, DIM = 8, 64
Sees = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A mask at a length, and how many times less processor time it must take."""

    name: str
    length: int
    sees: Sees
    must: float = 0.95
    dynamic: bool = True
    window: int | None = None  # where it is a causal one


def near(window: int, step: int = 1) -> Sees:
    return lambda i, j: (i >= j) & (i - j < window) & ((i - j) % step == 0)


def in_grid(i: Tensor, j: Tensor) -> Tensor:
    """Within 6 of the nearest center that leaves the whole kernel inside a grid of 64 x 64."""
    rows, columns = (i // 64).clamp(6, 57) - j // 64, (i % 64).clamp(6, 57) - j % 64
    return (rows.abs() <= 6) & (columns.abs() <= 6)


def scattered(length: int, block: int, share: float) -> Tensor:
    """Which blocks of keys the blocks of queries see: some at random, and their own."""
    blocks = length // block
    chosen = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)) < share - 1 / blocks
    return chosen | torch.eye(blocks, dtype=torch.bool)


SPARSE = scattered(4096, 64, 0.12)
CASES = (
    *(Case(f"window 256 at {n}", n, near(256), window=256) for n in (128, 256, 512, 1024, 2048)),
    Case("window 256 at 4096", 4096, near(256), 10, window=256),
    Case("window 256 at 8192", 8192, near(256), 25, window=256),
    Case("causal at 1024", 1024, near(1 << 30)),
    Case("causal at 4096", 4096, near(1 << 30)),
    Case("dilated, 256 keys 4 apart", 4096, near(1024, 4), 8),
    Case("12 % of blocks of 64", 4096, lambda i, j: SPARSE[i // 64, j // 64], 8, dynamic=False),
    Case("neighborhood of 13 x 13 in 64 x 64", 4096, in_grid, 8, dynamic=False),
)


@dataclass(frozen=True)
class Rule:
    """Linear attention at a length, and how many times less time than a softmax it must take."""

    name: str
    slots: Mapping[str, str]
    must: float
    length: int = 4096


RULES = (
    Rule("elu + 1 at 4096", {"feature": "elu_one"}, 8),
    Rule("delta at 4096", {"feature": "cosine", "state": "delta"}, 8),
    Rule("gated delta at 4096", {"feature": "cosine", "state": "gated_delta"}, 8),
    Rule("a gate for each feature at 4096", {"state": "gate(vector)", "normalizer": "linear(none)"}, 8),
)


class Causal(nn.Module):
    """Attention with what a rule may ask for beside it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Dense(nn.Module):
    """Attention under a mask, as models write it."""

    def __init__(self, sees: Sees) -> None:
        super().__init__()
        self.sees = sees

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.sees(i[:, None], i[None]))


class Session:
    """A file in onnxruntime."""

    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.best = (float("inf"), float("inf"))

    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        wall, processor_time = time.perf_counter(), time.process_time()
        (out,) = self.session.run(None, {x.name: feeds[x.name] for x in self.session.get_inputs()})
        spent = time.perf_counter() - wall, time.process_time() - processor_time
        self.best = min(self.best[0], spent[0]), min(self.best[1], spent[1])
        return out  # type: ignore[no-any-return]


def written(case: Case, folder: Path, strategy: str) -> tuple[Path, Path]:
    """The yardstick and our file."""
    inputs = tuple(torch.randn(3, 1, HEADS, case.length, DIM))
    length = torch.export.Dim("length", min=2, max=1 << 16)
    shapes = tuple({2: length} for _ in inputs) if case.dynamic else None
    dense, ours = folder / f"{case.name}.dense.onnx", folder / f"{case.name}.onnx"
    program = torch.onnx.export(
        Dense(case.sees).eval(), inputs, dynamo=True, opset_version=24, dynamic_shapes=shapes, verbose=False
    )
    assert program is not None
    program.save(dense)
    attn.export_onnx(Dense(case.sees).eval(), inputs, ours, dynamic_shapes=shapes, strategy=strategy)
    return dense, ours


def measured(case: Case, folder: Path, threads: int, rounds: int, strategy: str) -> dict[str, object]:
    """One row of the table."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (x.numpy() for x in torch.randn(3, 1, HEADS, case.length, DIM, generator=generator))
    feeds = {"q": q, "k": k, "v": v}
    dense, ours = (Session(path, threads) for path in written(case, folder, strategy))
    others = [own for own in (_own_window(case, folder, threads),) if own]
    apart = max(float(np.abs(dense.run(feeds) - one.run(feeds)).max()) for one in (ours, *others))
    until = time.perf_counter() + 0.3  # short ones are run more often
    for count in range(1000):
        if count >= rounds and time.perf_counter() > until:
            break
        for one in (dense, ours, *others):
            one.run(feeds)
    wall, busy = (dense.best[n] / ours.best[n] for n in (0, 1))
    milliseconds = {"dense ms": f"{1e3 * dense.best[0]:.2f}", "ours ms": f"{1e3 * ours.best[0]:.2f}"}
    milliseconds["GroupQueryAttention ms"] = f"{1e3 * others[0].best[0]:.2f}" if others else "-"
    ratios = {"wall": f"{wall:.2f}x", "processor time": f"{busy:.2f}x", "must": f"{case.must}x", "apart": f"{apart:.0e}"}
    return {"attention": case.name, **milliseconds, **ratios}


def ruled(rule: Rule, folder: Path, threads: int, rounds: int) -> dict[str, object]:
    """One row of the second table."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, rule.length, DIM, generator=generator)
    steps = torch.randn(1, HEADS, rule.length, DIM, generator=generator, dtype=torch.float64).sigmoid().log() / 16
    beta = torch.rand(1, HEADS, rule.length, generator=generator)
    slots = {"mask": "causal", **rule.slots}
    gate = steps.cumsum(2) if "vector" in str(slots) else steps[..., 0].cumsum(2)
    inputs = {"q": q, "k": k, "v": v, "gate": gate, "beta": beta}
    dense, ours = folder / "softmax.onnx", folder / "ruled.onnx"
    program = torch.onnx.export(Causal().eval(), tuple(inputs.values()), dynamo=True, opset_version=24, verbose=False)
    assert program is not None
    program.save(dense)
    policy = {
        "version": 1,
        "labels": {name: {"input": name} for name in ("gate", "beta")},
        "rules": [{"match": {}, "attn": slots, "fallback": "error"}],
    }
    attn.export_onnx(Causal().eval(), tuple(inputs.values()), ours, policy, check=False)
    tables = {name: inputs[name] for name in ("gate", "beta")}
    expected = attn.attend(q, k, v, slots, tables=tables, target="torch")
    feeds = {name: x.numpy() for name, x in inputs.items()}
    sessions = softmax, linear = Session(dense, threads), Session(ours, threads)
    apart = float(np.abs(linear.run(feeds) - expected.numpy()).max())
    for _ in range(rounds):
        for one in sessions:
            one.run(feeds)
    wall, busy = (softmax.best[n] / linear.best[n] for n in (0, 1))
    milliseconds = {"softmax ms": f"{1e3 * softmax.best[0]:.2f}", "ours ms": f"{1e3 * linear.best[0]:.2f}"}
    ratios = {"wall": f"{wall:.2f}x", "processor time": f"{busy:.2f}x", "must": f"{rule.must}x", "apart": f"{apart:.0e}"}
    return {"attention": rule.name, **milliseconds, **ratios}


def _own_window(case: Case, folder: Path, threads: int) -> Session | None:
    if case.window is None:
        return None
    path = folder / f"{case.name}.own.onnx"
    write_group_query(path, case.length, HEADS, DIM, case.window)
    return Session(path, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--strategy", default="auto")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if given.only in case.name:
                rows.append(measured(case, Path(folder), given.threads, given.rounds, given.strategy))
                print(*rows[-1].values(), sep="  ", flush=True)
        linear = [ruled(rule, Path(folder), given.threads, given.rounds) for rule in RULES if given.only in rule.name]
    print(*(" ".join(map(str, row.values())) for row in linear), sep="\n")
    title = f"onnxruntime {onnxruntime.__version__} on {processor()}, {given.threads} thread{'s' * (given.threads > 1)}"
    tables = [markdown(found) for found in (rows, linear) if found]
    (given.folder / "onnx.md").write_text("\n".join([f"{title}\n", *tables]))
    write_json(given.folder / "onnx.json", {"onnxruntime": onnxruntime.__version__, "rows": [*rows, *linear]})


if __name__ == "__main__":
    main()
