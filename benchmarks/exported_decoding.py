"""One token behind a long text in onnxruntime: a window's cache as we write it, beside a cache that holds everything.

    python benchmarks/exported_decoding.py FOLDER [--past 4096 16384] [--threads 1] [--rounds 20]

Writes `onnx_decoding.md` to FOLDER. One layer of Mistral with 32 heads of 64 (8 of keys) and a window of 256; everything else is
tiny, so that attention and its cache are what is measured. Both files compute the same; theirs joins the past and the new
key, and hides what the window does not show.

A second table is of a model that sees every token: our file with its cache in float32 beside our files with their caches in
int8, which must take 1.4 times less behind 16384 tokens, and in int4.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import MistralConfig, MistralForCausalLM

import attn_compiler as attn
from _tables import markdown, processor
from attn_compiler.export.stepwise import stepwise
from attn_compiler.targets.onnx.codes import TYPES, Codes

WINDOW, KV_HEADS, DIM = 256, 8, 64


class Session:
    """A file in onnxruntime, given and giving tensors that stay in its memory."""

    def __init__(self, path: Path, threads: int, past: int, held: str = "float32") -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.feeds = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in feeds(past, held=held).items()}
        self.best = float("inf")

    def run(self) -> np.ndarray:
        before = time.process_time()
        results = self.session.run_with_ort_values(None, self.feeds)
        self.best = min(self.best, time.process_time() - before)
        return results[0].numpy()  # type: ignore[no-any-return]


def feeds(past: int, tokens: int = 1, *, held: str = "float32") -> Mapping[str, np.ndarray]:
    """A token behind so many others; the keys of a shorter past are the last ones of a longer one."""
    draw = np.random.default_rng(0)
    whole = {
        f"past_key_values.0.{side}": draw.standard_normal((1, KV_HEADS, 1 << 15, DIM), np.float32) for side in ("key", "value")
    }
    sides = {name: np.ascontiguousarray(x[:, :, -past:]) for name, x in whole.items()}
    if held != "float32":
        codes = Codes(int(held.removeprefix("int")))
        scale = torch.tensor(4.0 / codes.largest)
        sides = {name: codes.encode(torch.from_numpy(x), scale).numpy() for name, x in sides.items()}
    return {"input_ids": np.full((1, tokens), 3), "position_ids": np.full((1, tokens), 1 << 15), **sides}


def model(window: int | None = WINDOW) -> MistralForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 32, "num_key_value_heads": KV_HEADS, "head_dim": DIM, "max_position_embeddings": 1 << 16}
    return MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=window)).eval()


def written(folder: Path) -> tuple[Path, Path]:
    """The file of PyTorch's exporter, and ours."""
    theirs, ours = folder / "theirs.onnx", folder / "ours.onnx"
    tokens = (torch.zeros(1, 32, dtype=torch.int64),)
    step = stepwise(model(), tokens, {})
    with torch.no_grad():
        program = torch.onnx.export(
            step.module, step.args, dynamo=True, opset_version=24, dynamic_shapes=step.dynamic_shapes, verbose=False,
            input_names=list(step.inputs), output_names=list(step.outputs),
        )  # fmt: skip
    assert program is not None
    program.save(theirs)
    attn.export_onnx(model(), tokens, ours, decode=True)
    return theirs, ours


def in_codes(folder: Path, past: int, threads: int, rounds: int) -> dict[str, object]:
    """A row where every token is seen: the cache as it comes, in int8 and in int4."""
    tokens = (torch.randint(0, 64, (1, 512), generator=torch.Generator().manual_seed(0)),)
    sessions = {}
    for held in ("float32", *TYPES):
        rule = {"match": {}, "attn": {"storage": {"kv_cache": {"type": held, "per": "channel"}}}, "fallback": "error"}
        policy = "exact" if held == "float32" else {"version": 1, "rules": [rule]}
        attn.export_onnx(model(None), tokens, folder / f"{held}.onnx", policy, decode=True)
        sessions[held] = Session(folder / f"{held}.onnx", threads, past, held)
    for _ in range(rounds):
        for one in sessions.values():
            one.run()
    times = {f"{held} us": f"{1e6 * one.best:.0f}" for held, one in sessions.items()}
    ratios = {held: f"{sessions['float32'].best / sessions[held].best:.2f}x" for held in TYPES}
    return {"past": past, **times, **ratios, "must (int8)": "1.4x"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--past", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = written(Path(folder))
        for past in given.past:
            theirs, ours = (Session(path, given.threads, n) for path, n in zip(paths, (past, WINDOW - 1), strict=True))
            apart = float(np.abs(theirs.run() - ours.run()).max())
            for _ in range(given.rounds):
                theirs.run()
                for _ in range(20):
                    ours.run()
            times = {"whole cache us": f"{1e6 * theirs.best:.0f}", "ours us": f"{1e6 * ours.best:.0f}"}
            rows.append({"past": past, **times, "processor time": f"{theirs.best / ours.best:.1f}x", "apart": f"{apart:.0e}"})
            print(*rows[-1].values(), sep="  ", flush=True)
        coded = [in_codes(Path(folder), past, given.threads, given.rounds) for past in given.past]
        for row in coded:
            print(*row.values(), sep="  ", flush=True)
    title = f"onnxruntime {onnxruntime.__version__} on {processor()}, {given.threads} thread(s)"
    given.folder.mkdir(parents=True, exist_ok=True)
    (given.folder / "onnx_decoding.md").write_text(f"{title}\n\n{markdown(rows)}\n{markdown(coded)}")


if __name__ == "__main__":
    main()
