"""What linear attention costs a language model, and how much of that distilling gives back."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import attn_compiler as attn
from _tables import processor
from attn_compiler.backend import attn_eagerly
from quality.language_model import CONTEXT, HEADS, LAYERS, WIDTH, LanguageModel, batches, kept, loss_of, texts

WINDOWS = (64, 32, 16, 8, 4)  # the first that costs at least a tenth in perplexity is taken
WORSE = 1.10
DISTILLED, CHANGED = "distilled", "distilled, low rank"
HYBRIDS = tuple(f"window + linear, {how}" for how in (DISTILLED, CHANGED))
# A state of 2 · d features holds as many numbers as the keys and values of that many tokens.
STATE_TOKENS = (2 * (WIDTH // HEADS) * (WIDTH // HEADS + 1)) // (2 * (WIDTH // HEADS))


@dataclass
class Outcome:
    """What came out for one seed."""

    seed: int
    window: int
    perplexity: dict[str, float]
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def closed(self, by: str) -> float:
        """How much of the gap that a window alone leaves is closed."""
        soft, window = self.perplexity["softmax"], self.perplexity["window only"]
        return (window - self.perplexity[by]) / (window - soft)


def policy(slots: Mapping[str, object]) -> dict[str, object]:
    return {"version": 1, "rules": [{"match": {"kind": "self"}, "attn": slots, "untrained": "allow"}]}


def window_only(window: int) -> dict[str, object]:
    return policy({"mask": f"causal & window({window})"})


LINEAR = policy({"feature": "hedgehog"})


def hybrid(window: int) -> dict[str, object]:
    far = {"mask": f"causal & ~window({window})", "feature": "hedgehog"}
    near = {"mask": f"causal & window({window})"}
    return policy({"mix": {"how": "shared_denominator", "branches": {"near": near, "far": far}}})


@torch.no_grad()
def perplexity(run: Callable[[Tensor], Tensor], held_out: Tensor, rows: int = 64) -> float:
    """Of texts that the model has not seen, always the same ones; in parts, so that little memory is needed."""
    text = next(batches(held_out, rows, seed=12345))
    return math.exp(sum(loss_of(run(part), part).item() for part in text.split(16)) / (rows / 16))


def compiled(model: LanguageModel, asked: Mapping[str, object]) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend=attn_eagerly, options={"policy": dict(asked)})


def measure(seed: int, asked: argparse.Namespace, say: Callable[[str], None]) -> Outcome:
    """Train a model, then find out what each attention makes of it."""
    text, held_out = texts()
    model, losses = kept(asked.folder, seed, text, asked.steps, asked.rows)
    found = Outcome(seed, 0, {"softmax": perplexity(model, held_out)}, {"softmax": {"training": losses}})
    say(f"seed {seed}: softmax {found.perplexity['softmax']:.3f}")
    for found.window in WINDOWS:
        found.perplexity["window only"] = perplexity(compiled(model, window_only(found.window)), held_out)
        say(f"  window({found.window}) alone {found.perplexity['window only']:.3f}")
        if found.perplexity["window only"] >= WORSE * found.perplexity["softmax"]:
            break
    same = found.window + STATE_TOKENS
    found.perplexity["a window of the hybrid's memory"] = perplexity(compiled(model, window_only(same)), held_out)
    first = (next(batches(text, asked.rows, seed)),)
    for name, rules in (("linear", LINEAR), ("window + linear", hybrid(found.window))):
        if asked.only not in ("", name):
            continue
        found.perplexity[f"{name}, untrained"] = perplexity(attn.adapt(model, rules, first), held_out)
        say(f"  {name}, untrained {found.perplexity[f'{name}, untrained']:.3f}")
        for how, rank in ((DISTILLED, 0), (CHANGED, asked.low_rank)):
            given, into = batches(text, asked.rows, seed + 1000), f"{name}, {how}"
            distilled = attn.distill(model, rules, given, steps=asked.lessons, logits=asked.logits, low_rank=rank)
            found.perplexity[into] = perplexity(distilled.model, held_out)
            found.curves[into] = {site: list(losses) for site, losses in distilled.curve.items()}
            say(f"  {into} {found.perplexity[into]:.3f}, closes {found.closed(into):.0%} of the gap")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200, help="of training the model")
    parser.add_argument("--lessons", type=int, default=300, help="of training each attention by itself")
    parser.add_argument("--logits", type=int, default=900, help="of training on the whole model's logits, behind that")
    parser.add_argument("--low-rank", type=int, default=8, help="by which that second part may change projections")
    parser.add_argument("--only", default="", choices=("", "linear", "window + linear"))
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for seed in asked.seeds:
        outcomes.append(measure(seed, asked, lambda line: print(line, flush=True)))
        (asked.folder / "quality.json").write_text(json.dumps([asdict(one) for one in outcomes]))
        (asked.folder / "quality.md").write_text(page(outcomes, asked))


def page(outcomes: list[Outcome], asked: argparse.Namespace) -> str:
    names = list(outcomes[0].perplexity)
    rows = [[name, *(f"{one.perplexity[name]:.3f}" for one in outcomes)] for name in names]
    rows += [
        ["window", *(str(one.window) for one in outcomes)],
        *([f"gap closed by {name}", *(f"{one.closed(name):.0%}" for one in outcomes)] for name in HYBRIDS if name in names),
    ]
    head = ["perplexity of a byte", *(f"seed {one.seed}" for one in outcomes)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
    curves = "\n".join(line for one in outcomes for line in _curves(one))
    return f"""# Quality of linear attention in a language model

{LAYERS} layers of width {WIDTH}, {HEADS} heads, {CONTEXT} bytes of context; each seed trained from scratch for
{asked.steps} steps of {asked.rows} × {CONTEXT} bytes on the standard library's sources, every tenth file held out.
Distilled: {asked.lessons} steps site by site, then {asked.logits} on the logits; only the maps of features learn. Low rank:
in that second part the projections beside the attentions may change, too, by matrices of rank {asked.low_rank}.
A state holds as many numbers as the keys and values of {STATE_TOKENS} tokens. {processor()}, one thread, shared with
other work. `python -m quality FOLDER` in `benchmarks`.

{table}

## Losses

At the start, a quarter, a half and the end: the part of each output's squares that is wrong; of the model that is
trained the cross entropy, of logits the KL divergence.

{curves}
"""


def _curves(one: Outcome) -> list[str]:
    """Each curve at four places."""
    lines = []
    for name, curve in one.curves.items():
        for site, losses in curve.items():
            quarters = (0, len(losses) // 4, len(losses) // 2, len(losses) - 1)
            lines.append(f"- seed {one.seed}, {name}, {site}: {', '.join(f'{losses[at]:.4f}' for at in quarters)}")
    return lines
