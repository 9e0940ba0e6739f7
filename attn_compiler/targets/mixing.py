"""Branches of one attention: each attends or gathers by itself, and here their results become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from attn_compiler.algebra.expr import Sort
from attn_compiler.algebra.variant import How, Mix, Variant
from attn_compiler.errors import ShapeError
from attn_compiler.targets.explicit import Sums
from attn_compiler.targets.held_past import divided
from attn_compiler.targets.operands import Operands

Result = tuple[Tensor, Tensor | None]  # the output, and the log-sum-exp where it was asked for
Attend = Callable[[Operands, Variant, bool], Result]
Gather = Callable[[Operands, Variant], Sums]


def refuse(mix: Mix, *, lse: bool) -> str | None:
    """Why branches cannot be mixed; None if they can."""
    if mix.how is How.LSE:
        name = next((branch.normalizer.name for _, branch in mix.branches if branch.normalizer.total is None), None)
        return f"the rows of `{name}` are not normalized, so it cannot be mixed by log-sum-exp" if name else None
    return f"branches that are mixed by `{mix.how.value}` have no log-sum-exp" if lse else None


def mixed(operands: Operands, mix: Mix, attend: Attend, gather: Gather, real: torch.dtype, *, lse: bool) -> Result:
    """Attend in every branch, and mix in `real`."""
    reason = refuse(mix, lse=lse)
    if reason:
        raise ShapeError(reason)
    weights = _weights(operands, mix, real)
    branches = [branch for _, branch in mix.branches]
    calls = [(replace(operands, past=past), one) for past, one in zip(divided(operands.past, branches), branches, strict=True)]
    if mix.how is How.SHARED:
        return _shared([gather(*call) for call in calls], weights), None
    if mix.how is How.SUM:
        return _sum([weight * attend(*call, False)[0] for weight, call in zip(weights, calls, strict=True)]), None
    out, totals = _by_lse([attend(*call, True) for call in calls], weights)
    return out, totals if lse else None


def _weights(operands: Operands, mix: Mix, real: torch.dtype) -> list[Tensor]:
    arrays = operands.arrays(real)
    return [arrays.tensor(arrays.read(weight), Sort.REAL) for weight in mix.weights]


def _shared(sums: list[Sums], weights: list[Tensor]) -> Tensor:
    gathered = [torch.where(one.sees, one.acc, 0.0) * weight for one, weight in zip(sums, weights, strict=True)]
    masses = [torch.where(one.sees, one.mass, 0.0) * weight for one, weight in zip(sums, weights, strict=True)]
    mass = _sum(masses)
    return torch.where(mass == 0, 0.0, _sum(gathered) / torch.where(mass == 0, 1.0, mass))


def _by_lse(results: list[Result], weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    totals = [total[..., None] + weight.log() for (_, total), weight in zip(results, weights, strict=True) if total is not None]
    peak = reduce(torch.maximum, totals).detach()
    peak = torch.where(peak.isfinite(), peak, 0.0)
    shares = [(total - peak).exp() for total in totals]
    whole = _sum(shares)
    some = torch.where(whole > 0, whole, 1.0)
    out = _sum([share / some * out for share, (out, _) in zip(shares, results, strict=True)])
    return out, (whole.log() + peak).squeeze(-1)


def _sum(parts: list[Tensor]) -> Tensor:
    return reduce(torch.add, parts)
