"""`attn.distill`: trains the parameters that a policy adds, and nothing else, until each attention gives what it gave before."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attn_compiler.adaptation.adapted import Adapted, PolicyLike, adapt
from attn_compiler.adaptation.lessons import Student, teaching
from attn_compiler.adaptation.low_rank import LowRank, with_low_rank
from attn_compiler.adaptation.progress import Progress, Settings, read_progress
from attn_compiler.algebra import wire
from attn_compiler.backend import read_settings
from attn_compiler.errors import ShapeError
from attn_compiler.planning.plan import Decision

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]  # what a model is called with once
Tell = Callable[[int, float], None]  # the number of a step, and its loss
LOGITS = "logits"  # the name of the loss of the whole model
LOW_RANK_RATE = 0.1  # of the rate: weights that mean something already are changed with more care than parameters that do not
_LEAST = 1e-12  # what an attention gives at least, for errors relative to it


@dataclass(frozen=True)
class Distilled:
    """An adapted model, and the loss of each of its attentions at every step: of its output's squares, the part that is wrong."""

    model: Adapted
    curve: Mapping[str, tuple[float, ...]]


def distill(
    model: nn.Module,
    policy: PolicyLike,
    batches: Iterable[Batch],
    *,
    steps: int,
    logits: int = 0,
    low_rank: int = 0,
    rate: float = 0.01,
    state: str | Path | None = None,
    save_every: int = 50,
    tables: Mapping[str, Tensor] | None = None,
    values: Mapping[str, int] | None = None,
    tell: Tell | None = None,
) -> Distilled:
    """Train for `steps` batches, each attention on what it reads in the unchanged model; then for `logits` more on its logits.

    With `low_rank`, that second part may also change the linear maps beside each attention, by matrices of that rank. The result
    then owns a copy of the model, with the changes in its weights; the given model is never changed.

    With a `state` file, training that was broken off goes on where it was: the batches that it has seen are passed over. The
    file of a training with other settings, or of attentions that compute something else, is refused.
    The rate falls to zero along a cosine, in each of the two parts.
    """
    given = iter(batches)
    first = next(given, None)
    if first is None:
        raise ShapeError("there is nothing to learn from: `batches` is empty")
    if low_rank < 0:
        raise ShapeError(f"low_rank is a number of ranks, or 0 for none; found {low_rank}")
    if low_rank and not logits:
        raise ShapeError(f"low_rank={low_rank} learns from the model's logits: say for how many steps, as logits=100")
    was_training = model.training
    model.eval()
    try:
        adapted = adapt(model, policy, *called_with(first), tables=tables, values=values)
        settings: Settings = {
            "attentions": _meaning(adapted), "steps": steps, "logits": logits, "low rank": low_rank, "rate": rate,
        }  # fmt: skip
        training = _Training(adapted, settings, Path(state) if state else None)
        training.run(chain([first], given), steps, logits, rate, save_every, tell)
    finally:
        model.train(was_training)
    return Distilled(training.finished(), {name: tuple(losses) for name, losses in training.progress.curve.items()})


def called_with(batch: Batch) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments of one call."""
    if isinstance(batch, Mapping):
        return (), batch
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def _decided(adapted: Adapted) -> list[Decision]:
    return [decision for decision in adapted.report.plan.decisions if decision.target is not None]


def _meaning(adapted: Adapted) -> str:
    """A digest of what the attentions compute that are trained, whatever the policy calls it and its file holds."""
    said = "\n".join(f"{d.site.name} {d.site.layer} {wire.write(d.variant)}" for d in _decided(adapted))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


class _Training:
    """What one call of `distill` works on."""

    def __init__(self, adapted: Adapted, settings: Settings, state: Path | None) -> None:
        self.adapted, self.state, self._teacher = adapted, state, adapted.model
        self._changes = self._may_change(int(settings["low rank"])) if settings["low rank"] else None
        changes = self._changes.learned if self._changes else {}
        self.learned = {**adapted.learned, **changes}
        own = {"params": list(adapted.learned.values()), "share": 1.0}
        self.optimizer = torch.optim.Adam([own, {"params": list(changes.values()), "share": LOW_RANK_RATE}] if changes else [own])
        self.progress = read_progress(state, settings, self.learned, self.optimizer) if state else Progress(settings)
        teacher = teaching(read_settings(adapted.options, None), adapted.learned.keys(), self._teach)
        self._watched = torch.compile(self._teacher, backend=teacher)

    def _may_change(self, rank: int) -> LowRank:
        """Have the student run a copy of the model, whose projections can change."""
        changes = with_low_rank(self._teacher, rank, sorted({d.site.name for d in _decided(self.adapted)}))
        self.adapted.run(changes.model)
        return changes

    def run(self, batches: Iterator[Batch], steps: int, logits: int, rate: float, save_every: int, tell: Tell | None) -> None:
        done, total = self.progress.step, steps + logits
        for number, batch in enumerate(islice(batches, done, total), done):
            part = number / steps if number < steps else (number - steps) / logits
            for group in self.optimizer.param_groups:
                group["lr"] = group["share"] * rate * (1 + math.cos(math.pi * part)) / 2
            self.optimizer.zero_grad()
            args, kwargs = called_with(batch)
            loss = self._sites(args, kwargs) if number < steps else self._whole(args, kwargs)
            self.optimizer.step()
            self.progress.step = number + 1
            if self.state and (number + 1) % save_every == 0:
                self.progress.write(self.state, self.learned, self.optimizer)
            if tell:
                tell(number + 1, loss)
        self.adapted.steps += self.progress.step
        if self.state:
            self.progress.write(self.state, self.learned, self.optimizer)
        if self.progress.step < total:
            raise ShapeError(f"`batches` ended after {self.progress.step} of {total} steps: give as many, or an endless iterator")

    def finished(self) -> Adapted:
        """The adapted model, with changes as part of its weights."""
        if self._changes:
            self._changes.merge()
            self.adapted.run(self._changes.model)
        return self.adapted

    def _sites(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """One step in which every attention learns from its own output: their parts of the parameters have nothing in common."""
        self._now: list[float] = []
        with torch.no_grad():
            self._watched(*args, **kwargs)
        return sum(self._now) / len(self._now)

    def _teach(self, name: str, student: Student, right: Tensor) -> None:
        with torch.enable_grad():
            wrong = (student().float() - right.float()).square().sum() / right.float().square().sum().clamp(min=_LEAST)
            wrong.backward()  # type: ignore[no-untyped-call]
        self._now.append(wrong.item())
        self.progress.curve.setdefault(name, []).append(self._now[-1])

    def _whole(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """One step on what the whole model says."""
        with torch.no_grad():
            right = logits_of(self._teacher(*args, **kwargs)).log_softmax(-1)
        said = logits_of(self.adapted(*args, **kwargs)).log_softmax(-1)
        loss = (right.exp() * (right - said)).sum(-1).mean()
        gradients = torch.autograd.grad(loss, list(self.learned.values()), allow_unused=True)  # a map may not run in a call
        for value, gradient in zip(self.learned.values(), gradients, strict=True):
            value.grad = gradient
        self.progress.curve.setdefault(LOGITS, []).append(loss.item())
        return loss.item()


def logits_of(out: Any) -> Tensor:
    """What a model says of the next token: its output, or what it calls logits."""
    found = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(found, Tensor):
        raise ShapeError(
            f"training on logits needs a model that returns them, as a tensor or as `.logits`; found {type(out).__name__}"
        )
    return found.float()
