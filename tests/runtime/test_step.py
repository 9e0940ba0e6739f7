"""Linear attention step by step: with a state for the past, steps of any lengths give what all tokens at once give."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from attn_compiler import attend, reference, step
from attn_compiler.errors import ShapeError
from attn_compiler.runtime.step import Past
from attn_compiler.testing import assert_all_within_budget

TOKENS = 90
TABLES = {
    "padding": torch.arange(TOKENS) >= torch.tensor([[0], [37]]),
    "gate": torch.rand(2, 4, TOKENS, generator=torch.Generator().manual_seed(4)).sigmoid().log().cumsum(-1),
    "beta": torch.rand(2, 4, TOKENS, generator=torch.Generator().manual_seed(7)),
    "hedgehog_q": torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(5)),
    "local_conv": torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(8)),
    "hedgehog_k": torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(6)),
}
ELU = {"mask": "causal", "feature": "elu_one"}
FADING = {"mask": "causal", "state": "decay((h + 1) / 8)"}
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "elu": {"feature": "elu_one", "mask": "causal"},
    "padding and means": {"feature": "elu_one", "mask": "causal & valid(padding)", "normalizer": "linear(mean)"},
    "decay": {"feature": "silu", "mask": "causal", "state": "decay((h + 1) / 8)", "normalizer": "linear(none)", "scale": 0.3},
    "gate": {"feature": "elu_one", "mask": "causal & valid(padding)", "state": "gate(scalar)"},
    "shifted weights": {"feature": "identity", "mask": "causal", "scale": 0.3, "normalizer": "linear(subtract)"},
    "learned features": {"feature": "hedgehog", "mask": "causal"},
    "delta": {"feature": "cosine", "mask": "causal", "state": "delta"},
    "gated delta, padding": {"feature": "cosine", "mask": "causal & valid(padding)", "state": "gated_delta"},
    "far keys": {"feature": "elu_one", "mask": "causal & ~window(12)", "state": "decay(0.1)"},
    "window": {"mask": "causal & window(7)"},
    "values beside a state": {"feature": "elu_one", "mask": "causal & valid(padding)", "output": "local_conv(5)"},
    "values behind a window": {"mask": "causal & window(3)", "output": "local_conv(5)"},
    "shared denominator": {
        "mix": {
            "how": "shared_denominator",
            "branches": {
                "near": {"mask": "causal & window(9) & valid(padding)"},
                "far": {"mask": "causal & ~window(9) & valid(padding)", "feature": "elu_one"},
            },
        }
    },
    "sum": {"mix": {"how": "lerp", "weights": {"all": 0.3}, "branches": {"near": {"mask": "causal & window(20)"}, "all": ELU}}},
    "heads": {"heads": {"0, 3": {"mask": "causal & window(5)"}, "1": FADING, "rest": ELU}},
}
CUTS = {"one by one after a prompt": [86, 1, 1, 1, 1], "pieces": [1, 5, 70, 14]}


def operands(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, TOKENS, 8), (2, 2, TOKENS, 8), (2, 2, TOKENS, 6)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def tables(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    read = ("hedgehog_q", "hedgehog_k") if name == "learned features" else ("padding", "gate", "beta", "local_conv")
    return {table: TABLES[table].to(dtype) if TABLES[table].dtype.is_floating_point else TABLES[table] for table in read}


def by_steps(name: str, cuts: list[int], leaves: list[Tensor]) -> Tensor:
    parts, past, position = [], None, 0
    for cut in cuts:
        new = (x[:, :, position : position + cut] for x in leaves)
        out, past = step(*new, VARIANTS[name], past, position=position, tables=tables(name, torch.float32))
        parts.append(out)
        position += cut
    return torch.cat(parts, dim=2)


def with_gradients(out: object, leaves: list[Tensor]) -> list[Tensor]:
    assert isinstance(out, Tensor)
    return [out.detach(), *torch.autograd.grad((out * out.detach().sin()).sum(), leaves)]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cuts", CUTS)
def test_steps_give_what_all_tokens_at_once_give(name: str, cuts: str) -> None:
    leaves, wide = operands(torch.float32), operands(torch.float64)
    exact = with_gradients(reference(*wide, VARIANTS[name], tables=tables(name, torch.float64)), wide)
    found = with_gradients(by_steps(name, CUTS[cuts], leaves), leaves)
    at_once = tables(name, torch.float32)
    assert_all_within_budget(
        found, exact, lambda: with_gradients(attend(*leaves, VARIANTS[name], tables=at_once, target="torch"), leaves)
    )


@pytest.mark.parametrize("name", ["gated delta, padding", "shared denominator"])
def test_in_a_compiled_model_steps_are_part_of_its_graph(name: str) -> None:
    torch.compiler.reset()
    given, (q, k, v) = tables(name, torch.float32), (x.detach() for x in operands(torch.float32))

    def two(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Past]:
        _, past = step(q[:, :, :60], k[:, :, :60], v[:, :, :60], VARIANTS[name], tables=given)
        return step(q[:, :, 60:], k[:, :, 60:], v[:, :, 60:], VARIANTS[name], past, position=60, tables=given)

    with torch.no_grad():
        found, then = torch.compile(two, backend="eager", fullgraph=True)(q, k, v)
        exact, after = two(q, k, v)
    assert type(then) is Past
    assert torch.allclose(found, exact, atol=1e-5)
    assert all(
        torch.allclose(x, y, atol=1e-5) for x, y in zip((*then.states, *then[1:]), (*after.states, *after[1:]), strict=True)
    )


def test_a_state_does_not_grow() -> None:
    q, k, v = (x.detach() for x in operands(torch.float32))
    _, first = step(q[:, :, :1], k[:, :, :1], v[:, :, :1], VARIANTS["elu"])
    _, last = step(q, k, v, VARIANTS["elu"], first, position=1)
    assert [x.shape for x in first.states] == [x.shape for x in last.states] == [(2, 2, 9, 7)]
    assert first.k.shape == last.k.shape == (2, 2, 0, 8)


def test_beside_a_state_a_branch_holds_its_window_and_no_more() -> None:
    q, k, v = (x.detach() for x in operands(torch.float32))
    shared = VARIANTS["shared denominator"]["mix"]["branches"]  # type: ignore[index]
    branches = {name: {**branch, "mask": branch["mask"].removesuffix(" & valid(padding)")} for name, branch in shared.items()}
    slots = {"mix": {"how": "shared_denominator", "branches": branches}}
    _, early = step(q[:, :, :5], k[:, :, :5], v[:, :, :5], slots)
    _, late = step(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], slots, early, position=5)
    assert (len(early.states), early.k.shape[2]) == (0, 5)
    assert [tuple(x.shape) for x in late.states] == [(2, 2, 9, 7)]
    assert torch.equal(late.k, k[:, :, -8:])


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ({"mask": "causal"}, "it is not linear"),
        ({"feature": "elu_one"}, "keys that come after them"),
        ({"heads": {"0": {"feature": "elu_one", "mask": "causal"}}}, "it is not linear"),
        ({"mask": "causal & (window(4) | sinks(2))"}, "see the first 2 tokens for ever"),
        ({"feature": "elu_one", "mask": "causal", "storage": {"qk": "int8"}}, "held in few bits"),
        ({"feature": "elu_one", "mask": "causal", "scale": "1 / k_len"}, "how many tokens there are"),
        ({"mask": "causal & window(4)", "scale": "1 / q_len"}, "how many tokens there are"),
        ({"mask": "causal & window(4) & keys('3:-4')"}, "how many tokens there are"),
        (
            {
                "mix": {
                    "how": "sum",
                    "weights": {"all": "1 / k_len"},
                    "branches": {"near": {"mask": "causal & window(4)"}, "all": ELU},
                }
            },
            "how many tokens there are",
        ),
    ],
)
def test_what_has_no_state_for_its_past_is_refused(slots: Mapping[str, object], said: str) -> None:
    q, k, v = operands(torch.float32)
    with pytest.raises(ShapeError, match=f"the past of this variant is no state: .*{said}"):
        step(q, k, v, slots)


def test_a_step_has_a_query_for_every_new_key() -> None:
    q, k, v = operands(torch.float32)
    with pytest.raises(ShapeError, match="as many queries as new keys; found 1 queries and 90 keys"):
        step(q[:, :, :1], k, v, VARIANTS["elu"])


@pytest.mark.parametrize(("name", "heads"), [("decay", 4), ("elu", 2)])
def test_a_past_of_another_variant_or_of_other_heads_is_refused(name: str, heads: int) -> None:
    q, k, v = operands(torch.float32)
    past = Past((torch.zeros(2, 3, 9, 7),), k[:, :, :0], v[:, :, :0])
    with pytest.raises(
        ShapeError, match=rf"expected a `past` of \[2, {heads}, 9, 7\], as an earlier step .*; found \[2, 3, 9, 7\]"
    ):
        step(q[:, :, :1], k[:, :, :1], v[:, :, :1], VARIANTS[name], past)
    with pytest.raises(ShapeError, match=r"expected a `past` with 1 states, .*; found 2"):
        step(q[:, :, :1], k[:, :, :1], v[:, :, :1], VARIANTS[name], past._replace(states=past.states * 2))
