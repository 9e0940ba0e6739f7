"""A whole Llama in onnxruntime: exported with a window by us, beside PyTorch's exporter without; times, and memory at its peak.

    python benchmarks/exported_model.py FOLDER [--length 4096] [--threads 1] [--rounds 3]

Writes `onnx_model.md` and `onnx_model.json` to FOLDER. Hidden size 512, 8 heads, intermediate size 1408, 4 layers, random
weights, lengths that may change; the window is 256. Each peak is that of a process of its own that runs the file once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import attn_compiler as attn
from _tables import markdown, processor, write_json
from exported import Session

POLICY = {"version": 1, "rules": [{"match": {"kind": "self"}, "attn": {"mask": "causal & window(256)"}}]}
TRACED = 512


class Last(nn.Module):
    """The logits of the last token."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1408}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_hidden_layers=4, max_position_embeddings=16384, **sizes))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False, logits_to_keep=1).logits  # type: ignore[no-any-return]


def written(folder: Path) -> dict[str, Path]:
    """The files to compare, by who wrote them."""
    torch.manual_seed(0)
    model, ids = Last().eval(), torch.randint(0, 1000, (2, TRACED))
    shapes = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    paths = {name: folder / f"{name}.onnx" for name in ("PyTorch's exporter, no window", "ours, window 256")}
    theirs, ours = paths.values()
    with torch.no_grad():
        program = torch.onnx.export(model, (ids,), dynamo=True, opset_version=24, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(theirs)
    attn.export_onnx(model, (ids,), ours, POLICY, dynamic_shapes=shapes)
    return paths


def peak(path: Path, length: int) -> float:
    """Megabytes that running a file adds to a process, at most."""
    run = [sys.executable, __file__, str(path), "--length", str(length), "--alone"]
    return float(subprocess.run(run, check=True, capture_output=True, text=True).stdout)


def alone(path: Path, length: int) -> None:
    session, ids = Session(path, 1), np.zeros((1, length), np.int64)
    before = megabytes()
    session.run({"input_ids": ids})
    print(megabytes() - before)


def megabytes() -> float:
    """The most memory that this process has held; what getrusage says would begin with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        alone(given.folder, given.length)
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = written(Path(folder))
        sessions = {name: Session(path, given.threads) for name, path in paths.items()}
        feeds = {"input_ids": np.random.default_rng(0).integers(0, 1000, (1, given.length))}
        for _ in range(given.rounds):
            for session in sessions.values():
                session.run(feeds)
        peaks = {name: peak(path, given.length) for name, path in paths.items()}
    rows = [
        {
            "file": name,
            "wall ms": f"{1e3 * x.best[0]:.0f}",
            "processor ms": f"{1e3 * x.best[1]:.0f}",
            "peak MB": f"{peaks[name]:.0f}",
        }
        for name, x in sessions.items()
    ]
    title = f"onnxruntime {onnxruntime.__version__} on {processor()}, {given.threads} thread(s), {given.length} tokens"
    given.folder.mkdir(parents=True, exist_ok=True)
    (given.folder / "onnx_model.md").write_text(f"{title}\n\n{markdown(rows)}")
    write_json(given.folder / "onnx_model.json", {"onnxruntime": onnxruntime.__version__, "length": given.length, "rows": rows})
    print(markdown(rows))


if __name__ == "__main__":
    main()
