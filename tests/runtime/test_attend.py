"""The arguments of `attend`: what they mean, and what is said where they are wrong."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Sort
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.variant import DerivedTable, Normalizer, Variant
from attn_compiler.errors import LanguageError, ShapeError, TableError
from attn_compiler.runtime.attend import Target, attend

CAUSAL = Variant(mask=e.k <= e.q)


def qkv(q_len: int = 9, k_len: int = 9, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, q_len, 8), (2, kv_heads, k_len, 8), (2, kv_heads, k_len, 8))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def test_without_positions_the_last_query_meets_the_last_key() -> None:
    q, k, v = qkv()
    torch.testing.assert_close(attend(q[:, :, -2:], k, v, CAUSAL), attend(q, k, v, CAUSAL)[:, :, -2:])


def test_positions_may_be_a_number_one_per_row_or_all_of_them() -> None:
    q, k, v = qkv(3)
    expected = attend(q, k, v, CAUSAL, q_positions=4)
    for positions in (torch.tensor([4, 4]), torch.tensor([4, 5, 6]), torch.tensor([[4, 5, 6]] * 2), torch.tensor(4)):
        torch.testing.assert_close(attend(q, k, v, CAUSAL, q_positions=positions), expected)


def test_a_bias_broadcasts_and_speaks_of_places_not_positions() -> None:
    q, k, v = qkv()
    bias = torch.randn(1, 4, 9, 9)
    order = torch.tensor([3, 1, 0, 2, 8, 7, 5, 4, 6])
    expected = attend(q, k, v, CAUSAL, bias=bias)
    shuffled = attend(q, k[:, :, order], v[:, :, order], CAUSAL, bias=bias[..., order], k_positions=order, q_positions=0)
    torch.testing.assert_close(shuffled, expected)
    row = torch.randn(9)
    torch.testing.assert_close(attend(q, k, v, CAUSAL, bias=row), attend(q, k, v, CAUSAL, bias=row.expand(2, 4, 9, 9)))


def test_a_bias_of_minus_infinity_hides_a_key() -> None:
    q, k, v = qkv()
    hidden = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    for target in ("torch", "reference"):
        torch.testing.assert_close(attend(q, k, v, Variant(), bias=hidden, target=target), attend(q, k, v, CAUSAL))


def test_a_scale_replaces_that_of_the_variant() -> None:
    q, k, v = qkv()
    torch.testing.assert_close(attend(q, k, v, CAUSAL, scale=0.5), attend(q * 0.5 * 8**0.5, k, v, CAUSAL))


def test_groups_of_heads_compute_their_own_variant() -> None:
    q, k, v = qkv()
    out = attend(q, k, v, Variant(groups=((IntegerSet.parse("1, 3"), CAUSAL),)))
    torch.testing.assert_close(out[:, 1::2], attend(q, k, v, CAUSAL)[:, 1::2])
    torch.testing.assert_close(out[:, ::2], attend(q, k, v, Variant())[:, ::2])


def test_any_strides_and_no_tokens_at_all() -> None:
    q, k, v = qkv()
    odd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(attend(*odd, CAUSAL), attend(q, k, v, CAUSAL))
    assert attend(q[:, :, :0], k, v, CAUSAL).shape == (2, 4, 0, 8)
    assert torch.equal(attend(q, k[:, :, :0], v[:, :, :0], CAUSAL), torch.zeros_like(q))


def test_a_derived_table_is_made_once_for_each_length() -> None:
    made: list[int] = []

    def reversed_order(length: int) -> range:
        made.append(length)
        return range(length - 1, -1, -1)

    place = e.table("reversed for this test", e.k)
    variant = Variant(mask=place <= e.q, derived=(DerivedTable("reversed for this test", reversed_order),))
    q, k, v = qkv()
    out = attend(q, k, v, variant)
    attend(q, k, v, variant)
    assert made == [9]
    torch.testing.assert_close(out, attend(q, k.flip(2), v.flip(2), CAUSAL))


def test_a_missing_table_is_named_with_those_given() -> None:
    variant = Variant(mask=e.table("padding", e.b, e.k, sort=Sort.BOOL))
    with pytest.raises(TableError, match=r'"padding" that is not in `tables`; did you mean "paddings"'):
        attend(*qkv(), variant, tables={"paddings": torch.ones(2, 9, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("padding", "message"),
    [
        (torch.ones(2, 9), "must have torch.bool; found torch.float32"),
        (torch.ones(1, 2, 9, dtype=torch.bool), "has 3 axes"),
        (torch.ones(2, 0, dtype=torch.bool), "is empty"),
        (torch.ones(2, 8, dtype=torch.bool), r"\[2, 8\], is read for 9 tokens at its axis 1: give at least 9, or 1"),
    ],
)
def test_a_table_that_does_not_fit_is_an_error(padding: Tensor, message: str) -> None:
    variant = Variant(mask=e.table("padding", e.b, e.k, sort=Sort.BOOL))
    with pytest.raises(TableError, match=message):
        attend(*qkv(), variant, tables={"padding": padding})


def test_a_table_may_hold_one_number_for_all_or_more_than_a_call_reads() -> None:
    variant = Variant(score=e.score + e.table("bias", e.h, e.k, sort=Sort.REAL))
    q, k, v = qkv()
    for bias in (torch.randn(1, 9), torch.randn(4, 1), torch.randn(5, 12)):
        every = bias[:4, :9].expand(4, 9).contiguous()
        torch.testing.assert_close(
            attend(q, k, v, variant, tables={"bias": bias}), attend(q, k, v, variant, tables={"bias": every})
        )
    with pytest.raises(TableError, match="4 heads at its axis 0"):
        attend(q, k, v, variant, tables={"bias": torch.randn(3, 9)})
    with pytest.raises(TableError, match="11 tokens at its axis 1"):  # keys stand from 2 on
        attend(q, k, v, variant, tables={"bias": torch.randn(4, 9)}, k_positions=2)


@pytest.mark.parametrize(
    ("slots", "tables", "message"),
    [
        ({"context": "extra(memory, 3)"}, {"memory_k": (1, 3, 3, 8), "memory_v": (1, 2, 3, 8)}, "4 heads of keys at its axis 1"),
        ({"context": "extra(memory, 3)"}, {"memory_k": (1, 4, 2, 8), "memory_v": (1, 4, 3, 8)}, "3 keys at its axis 2: give 3,"),
        ({"context": "extra(memory, 3)"}, {"memory_k": (1, 4, 3, 8), "memory_v": (1, 4, 3, 5)}, "8 components at its axis 3"),
        ({"output": "local_conv(5)"}, {"local_conv": (1, 4, 8, 9)}, "5 taps at its axis 3: give 5,"),
        ({"output": "local_conv(5)"}, {"local_conv": (1, 4, 4, 5)}, "8 components at its axis 2"),
        ({"output": "gate(sigmoid)"}, {"output_gate": (2, 4, 12, 8)}, "9 queries at its axis 2: give 9,"),
    ],
)
def test_tables_of_what_stands_around_an_attention_have_its_sizes(
    slots: dict[str, object], tables: dict[str, tuple[int, ...]], message: str
) -> None:
    q, k, v = (torch.randn(2, 4, 9, 8) for _ in range(3))
    given = {name: torch.randn(shape) for name, shape in tables.items()}
    with pytest.raises(TableError, match=message):
        attend(q, k, v, {"mask": "causal", **slots}, tables=given)


def test_operands_that_do_not_fit_each_other_are_errors() -> None:
    q, k, v = qkv()
    wrong = {
        r"\[batch, heads, tokens, dim\]": (q[0], k, v),
        "one dtype": (q.double(), k, v),
        "real numbers": (q.long(), k.long(), v.long()),
        "number of rows": (q[:1], k, v),
        "heads and tokens": (q, k, v[:, :, 1:]),
        "same dim": (q[..., 1:], k, v),
        "multiple": (q[:, :3], k, v),
    }
    for message, operands in wrong.items():
        with pytest.raises(ShapeError, match=message):
            attend(*operands, CAUSAL)
    with pytest.raises(ShapeError, match="one per row or one per token"):
        attend(*qkv(2), CAUSAL, q_positions=torch.tensor([1, 2]))
    sigmoid = Normalizer("sigmoid", weight=e.sigmoid(e.score), output=e.acc)
    with pytest.raises(ShapeError, match="no log-sum-exp"):
        attend(q, k, v, Variant(normalizer=sigmoid), return_lse=True)


def test_a_text_is_a_mask_of_the_policy_language() -> None:
    q, k, v = qkv()
    streaming = Variant(mask=(e.k <= e.q) & ((e.q - e.k < 3) | (e.k < 2)))
    torch.testing.assert_close(attend(q, k, v, "causal & (window(3) | sinks(2))"), attend(q, k, v, streaming))
    torch.testing.assert_close(attend(q, k, v, "causal", scale="1 / dim"), attend(q, k, v, CAUSAL, scale=1 / 8))


@pytest.mark.parametrize(("grid", "tokens"), [("[3, 3]", 10), ("[3, 3]", 8), ("square", 10)])
def test_a_geometry_of_other_tokens_is_refused(grid: str, tokens: int) -> None:
    variant = yaml.safe_load(f"{{geometry: {grid}, mask: neighborhood(kernel=3)}}")
    with pytest.raises(LanguageError, match=f"tokens, and this attention has {tokens} keys"):
        attend(*qkv(tokens, tokens), variant)


def test_a_causal_geometry_may_be_filled_in_part() -> None:
    q, k, v = qkv()
    grid = {"geometry": [3, 3], "mask": "causal & neighborhood(kernel=3, causal=True, edge='clip')"}
    torch.testing.assert_close(attend(q[:, :, :7], k[:, :, :7], v[:, :, :7], grid), attend(q, k, v, grid)[:, :, :7])


def test_a_mapping_that_has_changed_is_read_again() -> None:
    q, k, v = qkv()
    slots: dict[str, object] = {"mask": "causal & window(w)"}
    narrow = attend(q, k, v, slots, values={"w": 1})
    assert torch.equal(narrow, attend(q, k, v, slots, values={"w": 1}))  # type: ignore[arg-type]
    torch.testing.assert_close(narrow, v.repeat_interleave(2, dim=1))
    assert not torch.equal(narrow, attend(q, k, v, slots, values={"w": 2}))  # type: ignore[arg-type]
    slots["mask"] = "causal"
    assert torch.equal(attend(q, k, v, slots), attend(q, k, v, "causal"))  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["auto", "cpp", "torch", "reference"])
def test_more_queries_than_positions_are_refused(target: Target) -> None:
    with pytest.raises(ShapeError, match="9 queries cannot stand at the last of 5 keys"):
        attend(*qkv(9, 5), CAUSAL, k_positions=torch.arange(5), target=target)
