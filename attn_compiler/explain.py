"""Says what would become of a model: its attentions, what each computes, what a policy makes of it, and why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from attn_compiler import library
from attn_compiler.backend import Settings
from attn_compiler.graph.analysis import analyze
from attn_compiler.graph.weights import fingerprints, weights_of
from attn_compiler.planning.plan import Plan
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.report import Report, report_of


def explain(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    policy: str | Path | Mapping[str, object] | Policy | None = None,
    *,
    tables: Mapping[str, Tensor] | None = None,
    values: Mapping[str, int] | None = None,
    training: bool | None = None,
) -> Report:
    """Run `model` once on these arguments, under Dynamo, and report what the backend would do. Nothing is rewritten.

    On the meta device nothing is computed, so that a model of any size can be looked at. Gradients are recorded if
    `training`, by default as the model itself says: not after `model.eval()`. What torch.compile compiled before is
    forgotten, as by `torch.compiler.reset()`.
    """
    settings = Settings(library.load_policy(policy if policy is not None else "exact"), dict(tables or {}), dict(values or {}))
    plans: list[Plan] = []

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        own = replace(settings, policy=settings.policy.on(lambda: fingerprints(weights_of(gm, example_inputs))))
        plans.append(analyze(gm, example_inputs, own.planner).plan)
        return gm.forward

    torch.compiler.reset()
    with torch.set_grad_enabled(_trains(model) if training is None else training):
        torch.compile(model, backend=look, dynamic=False)(*args, **(kwargs or {}))
    torch.compiler.reset()
    return report_of(sum(plans, Plan()), settings.policy, len(plans))


def _trains(model: Callable[..., Any]) -> bool:
    """Whether a model is in training mode; a function is not."""
    return isinstance(model, nn.Module) and model.training
