"""How much a result may err: derived from what a plain implementation in the same precision errs, never picked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from attn_compiler.torch_private import EveryResult

Plain = Callable[[], Sequence[Tensor]]  # runs a plain implementation
Budget = Callable[[float, Tensor, torch.dtype], float]
RUNS = 32  # of a plain implementation, at most

# What moves or picks numbers, and never rounds.
_MOVES = ("cat", "clone", "constant_pad_nd", "copy", "detach", "embedding", "expand", "flip", "gather", "index", "index_select")
_PICKS = ("abs", "amax", "amin", "clamp", "masked_fill", "maximum", "minimum", "neg", "relu", "tril", "triu", "where")
_MAKES = ("arange", "full", "full_like", "new_full", "new_zeros", "ones", "ones_like", "repeat", "stack", "zeros", "zeros_like")
_EXACT = frozenset((*_MOVES, *_PICKS, *_MAKES))


def budget(error: float, exact: Tensor, dtype: torch.dtype) -> float:
    """The largest error that a target may make: twice that of a plain implementation, and a few units in the last place."""
    last_place = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0  # whole numbers and flags are right or wrong
    return 2 * error + 4 * last_place * largest(exact)


def largest(x: Tensor) -> float:
    """The magnitude of a result, besides what is no number."""
    finite = x[x.isfinite()]
    return finite.double().abs().max().item() if finite.numel() else 0.0


def error_of(result: Tensor, exact: Tensor) -> float:
    """The largest distance to the exact result; infinite where one is a number and the other is not."""
    assert result.shape == exact.shape, f"shape {list(result.shape)} instead of {list(exact.shape)}"
    result, exact = result.double(), exact.double()
    same = (result == exact) | (result.isnan() & exact.isnan())
    wrong = torch.where(same, 0.0, (result - exact).abs().nan_to_num(nan=math.inf))
    return wrong.max().item() if wrong.numel() else 0.0


def over_budget(
    actual: Sequence[Tensor], exact: Sequence[Tensor], run_plain: Plain, names: Sequence[str], budget: Budget = budget
) -> list[str]:
    """What is wrong with results that are computed together, each by its own budget.

    Roundings may cancel. A plain run that erred less than ours has to may just have been lucky: then it is repeated, rounding
    in other directions, and the error of a plain implementation is the largest of those runs.
    """
    expected = run_plain()
    ours, errors = list(map(error_of, actual, exact)), list(map(error_of, expected, exact))
    for seed in range(RUNS + 1):
        limits = map(budget, errors, exact, (x.dtype for x in expected))
        wrong = [found for found in zip(names, ours, limits, strict=True) if not found[1] <= found[2] < math.inf]
        if not wrong or seed == RUNS:
            break
        with rounding_otherwise(seed):
            again = run_plain()
        errors = list(map(max, errors, map(error_of, again, exact)))
    return [f"{name}: the error is {error:.3g}, where {limit:.3g} is allowed" for name, error, limit in wrong]


def assert_all_within_budget(
    actual: Sequence[Tensor], exact: Sequence[Tensor], run_plain: Plain, names: Sequence[str] = ()
) -> None:
    """Raise where one of several results is further from the exact one than its budget allows."""
    wrong = over_budget(actual, exact, run_plain, names or [f"result {place}" for place in range(len(exact))])
    assert not wrong, "; ".join(wrong)


def assert_within_budget(actual: Tensor, exact: Tensor, plain_result: Tensor, where: str = "the result") -> None:
    """Raise where `actual` is further from `exact` than the budget allows, or is not finite."""
    assert_all_within_budget([actual], [exact], lambda: [plain_result], [where])


def rounding_otherwise(seed: int) -> AbstractContextManager[object]:
    """Let what every operation computes be rounded to a neighbor, as another order of its sums might."""
    generator = torch.Generator().manual_seed(seed)

    def rounded(operator: str, x: Tensor) -> Tensor:
        if operator in _EXACT or not x.dtype.is_floating_point:
            return x
        places = torch.randint(-1, 2, x.shape, generator=generator)
        moved = x * (1 + places * torch.finfo(x.dtype).eps).to(x.dtype)
        filled = x.abs() > torch.finfo(x.dtype).max / 2  # what is added to it vanishes, in whatever order
        return torch.where(moved.isfinite() & ~filled, moved, x)

    return EveryResult(rounded)
