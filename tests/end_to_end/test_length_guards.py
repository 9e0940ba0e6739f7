"""Rules that ask for a length or a phase: what a shape computes depends on the shape alone, never on what was compiled before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.testing import assert_within_budget
from end_to_end.models import like_llama, llama, tokens

pytestmark = pytest.mark.usefixtures("compiled")
Shape = tuple[int, int]  # queries and keys
CAPPED = {"score": "softcap(score, 2)"}


def policy(match: dict[str, object], slots: dict[str, object]) -> dict[str, object]:
    return {"policy": {"version": 1, "rules": [{"match": match, "attn": slots}]}}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(2 * torch.tanh(q @ k.mT / 2), -1) @ v


def operands(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(queries * 1000 + keys)
    q, k, v = (torch.randn(2, 2, length, 8, generator=draw) for length in (queries, keys, keys))
    return q, k, v


def computed(run: Callable[..., Tensor], shapes: Sequence[Shape]) -> list[Shape]:
    """The shapes at which `run` computes what the rule says; at all others it computes what the model does."""
    taken = []
    for shape in shapes:
        given = operands(*shape)
        wide = [x.double() for x in given]
        out, asked = run(*given), capped(*wide)
        if torch.allclose(out.double(), asked, atol=1e-3):
            taken.append(shape)
        meant = capped if shape in taken else attend
        assert_within_budget(out, meant(*wide), meant(*given), str(shape))
    return taken


DECODED = [(3, 40), (16, 17), (2, 3), (1, 20), (1, 30), (5, 50)]
OTHERS = [(20, 60), (30, 30), (17, 18), (9, 9), (16, 16), (40, 20), (2, 2)]


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("first", [DECODED, OTHERS], ids=["few queries first", "many queries first"])
def test_a_phase_is_that_of_the_shape_at_hand(first: Sequence[Shape], dynamic: bool | None) -> None:
    shapes = [*first, *DECODED, *OTHERS]
    decode = torch.compile(attend, backend="attn", dynamic=dynamic, options=policy({"phase": "decode"}, CAPPED))
    assert set(computed(decode, shapes)) == set(DECODED)
    torch.compiler.reset()
    prefill = torch.compile(attend, backend="attn", dynamic=dynamic, options=policy({"phase": "prefill"}, CAPPED))
    assert set(computed(prefill, shapes)) == set(OTHERS)


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("first", [(9, 9), (20, 60)], ids=["self first", "cross first"])
def test_a_kind_that_only_lengths_can_tell_is_that_of_the_shape_at_hand(first: Shape, dynamic: bool | None) -> None:
    run = torch.compile(attend, backend="attn", dynamic=dynamic, options=policy({"kind": "self"}, CAPPED))
    shapes = [first, (30, 30), (20, 60), (16, 16), (17, 18), (9, 9), (40, 20)]
    assert set(computed(run, shapes)) == {(queries, keys) for queries, keys in shapes if queries == keys}


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_tokens_are_those_of_the_shape_at_hand(dynamic: bool | None) -> None:
    match = {"min_tokens": 18, "max_tokens": 30}
    run = torch.compile(attend, backend="attn", dynamic=dynamic, options=policy(match, CAPPED))
    shapes = [*DECODED, *OTHERS, *DECODED]
    assert set(computed(run, shapes)) == {(q, k) for q, k in shapes if 18 <= k <= 30}


def test_a_rule_for_any_length_adds_no_guard(compiled: list[int]) -> None:
    rules = [{"match": {"phase": ["prefill", "decode"]}, "attn": CAPPED}, {"match": {"phase": "train"}, "attn": "exact"}]
    options = {"policy": {"version": 1, "rules": rules}}
    run = torch.compile(attend, backend="attn", dynamic=True, options=options)
    shapes = [shape for shape in (*DECODED, *OTHERS) if min(shape) > 1]
    assert computed(run, shapes) == shapes
    assert len(compiled) == 1


@pytest.mark.parametrize(("implementation", "dynamic"), [("eager", True), ("sdpa", None)])
def test_below_its_length_a_rule_leaves_a_model_alone(implementation: str, dynamic: bool | None, compiled: list[int]) -> None:
    torch.manual_seed(0)
    model = llama(implementation, num_hidden_layers=1).eval()
    exact, options = copy.deepcopy(model).double(), policy({"min_tokens": 20}, {"mask": "window(4)"})
    run = torch.compile(model, backend="attn", dynamic=dynamic, options=options)
    with torch.no_grad():
        for length in (7, 12, 20, 33, 19, 40, 9):
            by_hand = like_llama(tokens(3, length), 4 if length >= 20 else None)
            actual = like_llama(tokens(3, length))(run)
            assert_within_budget(actual, by_hand(exact), by_hand(model), f"{length} tokens")
    assert len(compiled) == (2 if dynamic else 3)


def test_a_self_attention_never_decodes_and_needs_no_guard_for_that(compiled: list[int]) -> None:
    def to_itself(x: Tensor) -> Tensor:
        return attend(x, x, x)

    run = torch.compile(to_itself, backend="attn", dynamic=True, options=policy({"phase": "decode"}, CAPPED))
    for length in (7, 33, 16, 17):
        x, _, _ = operands(length, length)
        assert_within_budget(run(x), to_itself(x.double()), to_itself(x), f"{length} tokens")
    assert len(compiled) == 1


def of_kept(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    places = keep.nonzero().flatten()
    return attend(q, k.index_select(2, places), v.index_select(2, places))


@pytest.mark.parametrize("match", [{"min_tokens": 10}, {"phase": "decode"}, {"kind": "self"}])
def test_a_length_that_depends_on_data_is_refused(match: dict[str, object]) -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = torch.compile(of_kept, backend="attn", options=policy(match, CAPPED))
        given, keep = operands(3, 20), torch.arange(20) < 15
        out = run(*given, keep)
    wide = [x.double() for x in given]
    assert_within_budget(out, of_kept(*wide, keep), of_kept(*given, keep))
    [(_, refusal)] = attn.reports()[-1].refusals
    assert "depends on data" in refusal.reason
