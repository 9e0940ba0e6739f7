"""Attention rewritten by hand in a model that runs eagerly: plain torch, and the masks that a test writes itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

import attn_compiler as attn
from attn_compiler import Report
from attn_compiler.testing.budget import assert_all_within_budget
from end_to_end.models import Run, assert_outcome, double, outcome

RULE = "rule 1"
Seen = Callable[[int, Tensor, Tensor], Tensor | None]  # the number of the attention, its q and k: what a query sees


class ByHand(TorchFunctionMode):
    """Every scaled_dot_product_attention as the formula, where only what `seen` says is seen: joined to the model's own mask."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen, self.count = seen, 0

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.count += 1
        return self.attend(*args, **(kwargs or {}))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        assert dropout_p == 0
        groups = query.shape[1] // key.shape[1]
        assert groups == 1 or enable_gqa
        k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool)
        if is_causal:
            visible = visible.tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        elif attn_mask is not None:
            scores = scores + attn_mask
        asked = self.seen(self.count - 1, query, key)
        visible = visible if asked is None else visible & asked
        return self.formula(query, k, v, scores, visible)

    def formula(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
        """What becomes of the scores; keys and values are those of each query head."""
        weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
        return weights.masked_fill(~visible, 0.0) @ v  # also where a query sees nothing


def by_hand(run: Run, seen: Seen, rewriting: type[ByHand] = ByHand) -> Run:
    """The same run, with every attention rewritten."""

    def rewritten(model: nn.Module) -> Tensor:
        with fused(model), rewriting(seen) as mode:
            out = run(model)
        assert mode.count
        return out

    return rewritten


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """A model of transformers calls the operator that is rewritten, whatever it called before."""
    if not isinstance(model, PreTrainedModel):
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    yield
    model.set_attn_implementation(before)


def everywhere(mask: Tensor) -> Seen:
    return lambda number, q, k: mask


def compiled(model: nn.Module, policy: Mapping[str, object] | str | Path, **options: object) -> nn.Module:
    return torch.compile(model, backend="attn", options={"policy": policy, **options})


def compiled_since(before: Iterable[Report]) -> list[Report]:
    """The reports of what was compiled since then: the list is short, and other tests fill it too."""
    old = {id(report.plan.decisions) for report in before}
    return [report for report in attn.reports() if id(report.plan.decisions) not in old]


def check(
    model: nn.Module,
    run: Run,
    policy: Mapping[str, object] | str | Path,
    seen: Seen,
    rewriting: type[ByHand] = ByHand,
    **options: object,
) -> Report:
    """Compile a model with a policy, compare with attention rewritten by hand; the report of its only graph."""
    before, rewritten = attn.reports(), by_hand(run, seen, rewriting)
    with torch.no_grad():
        actual = run(compiled(model, policy, **options))
        exact, unchanged = rewritten(double(model)), run(double(model))
        assert_all_within_budget([actual], [exact], lambda: [rewritten(model)])
    assert not torch.allclose(exact, unchanged, rtol=1e-3), "the policy changes too little to be seen"
    (report,) = compiled_since(before)
    return report


def check_training(
    model: nn.Module, run: Run, policy: Mapping[str, object] | str | Path, seen: Seen, rewriting: type[ByHand] = ByHand
) -> Report:
    """The same with the gradients of all parameters."""
    before = attn.reports()
    assert_outcome(outcome(compiled(model, policy), run), model, by_hand(run, seen, rewriting))
    (report,) = compiled_since(before)
    return report


def became(report: Report) -> list[tuple[str, ...]]:
    """What the report says of each attention: its name and kind, what became of it, and by which rule."""
    sites = json.loads(report.to_json())["sites"]
    return [(site["name"], site["kind"], site["outcome"], site["rule"]) for site in sites]


def computed(report: Report) -> list[float]:
    """The part of each attention's map that is computed, as the report has it."""
    return [site["costs"]["density_after"] for site in json.loads(report.to_json())["sites"]]


def policy(mask: object, kind: str = "self", **more: object) -> dict[str, object]:
    slots = {"heads": mask} if isinstance(mask, dict) else {"mask": mask}
    if "geometries" in more:
        slots["geometry"] = "image"
    return {"version": 1, **more, "rules": [{"match": {"kind": kind}, "attn": slots}]}


def all_became(report: Report, outcome: str, names: list[str], kind: str = "self") -> None:
    assert became(report) == [(name, kind, outcome, RULE) for name in names]
    template = names[0].replace(".0.", ".{0-1}.")
    assert f"{template} (2 alike): {outcome}, by {RULE}" in str(report)


def with_weights(model: nn.Module) -> nn.Module:
    """New models are nearly linear: larger weights let every mask be seen in the results."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()
