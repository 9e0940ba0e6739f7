"""A budget allows what roundings explain, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attn_compiler.testing.budget import RUNS, assert_all_within_budget, assert_within_budget, rounding_otherwise

EPS = torch.finfo(torch.float32).eps
A, B = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def nothing(a: Tensor, b: Tensor) -> Tensor:
    """A sum without what it adds up to: zero, for those who add in the same order."""
    return (a * b).sum() - (a * b).sum()


def test_what_cancels_may_err_like_a_plain_implementation_that_adds_in_another_order() -> None:
    a, b = A.float(), B.float()
    assert nothing(a, b) == 0
    ours = (a * b).sum() - (a * b).flip(0).cumsum(0)[-1]
    assert_all_within_budget([ours + EPS], [torch.zeros((), dtype=torch.float64)], lambda: [nothing(a, b)])


def test_what_roundings_do_not_explain_is_an_error_however_often_a_plain_implementation_runs() -> None:
    runs = []

    def plain() -> list[Tensor]:
        runs.append(1)
        return [nothing(A.float(), B.float())]

    with pytest.raises(AssertionError, match=r"result 0: the error is 0.001, where [\d.e-]+ is allowed"):
        assert_all_within_budget([torch.tensor(1e-3)], [torch.zeros((), dtype=torch.float64)], plain)
    assert len(runs) == 1 + RUNS


def test_every_result_has_a_budget_of_its_own() -> None:
    exact = [torch.full((3,), 1e6, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    names, plain = ["the large one", "the small one"], [x.float() for x in exact]
    with pytest.raises(AssertionError, match=r"^the small one"):
        assert_all_within_budget([plain[0], plain[1] + 1e-3], exact, lambda: plain, names)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_no_budget_allows_for_what_is_no_number(wrong: float) -> None:
    exact = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_within_budget(torch.tensor([1.0, wrong, 1.0]), exact, torch.ones(3))
    with pytest.raises(AssertionError):  # nor is anything allowed because a plain implementation gives none
        assert_within_budget(torch.ones(3), exact, torch.tensor([1.0, wrong, 1.0]))


def test_what_is_no_number_anywhere_is_right() -> None:
    numbers = torch.tensor([1.0, math.nan, -math.inf])
    assert_within_budget(numbers, numbers.double(), numbers)


def test_rounding_otherwise_changes_what_is_computed_by_a_place_and_nothing_that_is_moved() -> None:
    x = A.float()
    with rounding_otherwise(0):
        moved = torch.where(x > 0, torch.cat([x[32:], x[:32]]).flip(0)[..., None].squeeze(-1).clone(), x)
        computed = x * 1.0
    assert torch.equal(moved, torch.where(x > 0, torch.cat([x[32:], x[:32]]).flip(0), x))
    assert not torch.equal(computed, x)
    assert ((computed - x).abs() <= 2 * EPS * x.abs()).all()


def test_rounding_otherwise_reaches_gradients() -> None:
    x = A.float().requires_grad_()
    (usual,) = torch.autograd.grad(x.exp().sum(), x)
    with rounding_otherwise(0):
        (other,) = torch.autograd.grad(x.exp().sum(), x)
    assert not torch.equal(usual, other)
    torch.testing.assert_close(usual, other)


def test_a_fill_absorbs_what_is_added_to_it_in_whatever_order() -> None:
    hidden = torch.full((4,), torch.finfo(torch.float32).min)
    with rounding_otherwise(0):
        torch.testing.assert_close(torch.softmax(A[:4].float() + hidden, -1), torch.full((4,), 0.25), rtol=4 * EPS, atol=0)


def test_the_sum_inside_of_a_gradient_of_softmax_is_rounded_otherwise_too() -> None:
    scores = torch.zeros(4, 32).requires_grad_()

    def gradient() -> Tensor:
        """Zero, since a sum of weights that add up to one never changes; unless it is computed with an error."""
        (found,) = torch.autograd.grad(torch.softmax(scores, -1).sum(), scores)
        return found

    assert (gradient() == 0).all()
    with rounding_otherwise(0):
        other = gradient()
    assert (other != 0).any()
    assert other.abs().max() <= 8 * EPS / 32
