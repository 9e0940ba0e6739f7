"""Tokens that share scales are alike in the slot `order`: against permuting, rounding block by block and putting back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.algebra import expr as e
from attn_compiler.algebra import wire
from attn_compiler.algebra.simplify import simplify
from attn_compiler.errors import LanguageError, ShapeError
from attn_compiler.export.plain import PlainTarget
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.resolve import resolve
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.planning.slots import Naming, read_slots
from attn_compiler.planning.yaml_text import entry_of
from attn_compiler.runtime.exported import uncarried
from attn_compiler.testing import assert_within_budget, variant_of

ROWS, COLUMNS, SIZE = 7, 10, 24  # the last block is short
LENGTH = ROWS * COLUMNS
SHUFFLED = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(7)).tolist()
BITMAP = torch.ones(3, 3).tril().bool()
GIVEN = {"shuffled.inverse": torch.tensor(SHUFFLED).argsort(), "bitmap": BITMAP, "real": torch.arange(LENGTH) < 60}
ORDERS = {  # and the original positions in them
    "axes(1, 0)": sorted(range(LENGTH), key=lambda n: n % COLUMNS),
    "tiles(4, 4)": sorted(range(LENGTH), key=lambda n: (n // COLUMNS // 4, n % COLUMNS // 4)),
    "table(shuffled)": SHUFFLED,
}
MASKS = ["all", "causal", "neighborhood([3, 3])", f"blocks(bitmap, {SIZE})", "valid(real)"]
INT8 = {"type": "int8", "per": f"block({SIZE})"}


def qkv(q_len: int = LENGTH, k_len: int = LENGTH, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a column are of one size."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, heads, length, 16, generator=generator) for heads, length in ((4, q_len), (2, k_len), (2, k_len))]
    q, k, v = (x * 2.0 ** -(torch.arange(x.shape[2]) % COLUMNS)[:, None] for x in drawn)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def slots_of(order: str | None = "axes(1, 0)", storage: object = None, **more: object) -> dict[str, Any]:
    placed = {"geometry": [ROWS, COLUMNS]} | ({"order": order} if order else {})
    return {**placed, "storage": {"qk": INT8} if storage is None else storage, **more}


def back(x: Tensor, order: list[int], most: int = 127, *, smooth: bool = False) -> Tensor:
    """Permute, round block by block, un-permute."""
    mean = x.mean(-2, keepdim=True) if smooth else torch.zeros(())
    found = torch.empty_like(x)
    for start in range(0, len(order), SIZE):
        tokens = order[start : start + SIZE]
        some = x[:, :, tokens] - mean
        largest = some.abs().amax((-1, -2), keepdim=True)
        found[:, :, tokens] = torch.round(some * (most / largest)) * (largest / most) + mean
    return found


def attended(target: str, given: tuple[Tensor, ...], slots: object, **more: Any) -> Tensor:
    return attn.attend(*given, slots, target=target, **{"tables": GIVEN, **more})  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_an_order_are_rounded_together(order: str, mask: str) -> None:
    q, k, v = given = qkv()
    slots = slots_of(order, mask=mask)
    plain = {name: x for name, x in slots.items() if name != "storage"}
    expected = attended("reference", (back(q, ORDERS[order]), back(k, ORDERS[order]), v), plain)
    found, ours = attended("torch", given, slots), attended("cpp", given, slots)
    torch.testing.assert_close(attended("reference", given, slots), expected, rtol=1e-5, atol=1e-6)
    assert_within_budget(found, expected, attended("torch", given, slots))
    assert_within_budget(ours, expected, found)
    control = attended("torch", given, {**slots, "mask": plain["mask"], "storage": {"qk": INT8}, "order": "axes(0, 1)"})
    assert mask.startswith("blocks") or (control - expected).abs().max() > 100 * (found - expected).abs().max()


@pytest.mark.parametrize("target", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_are_kept_apart_whatever_the_order(target: str, dtype: torch.dtype) -> None:
    q, k, v = given = qkv(dtype=dtype)
    order = ORDERS["axes(1, 0)"]
    slots = slots_of(storage={"qk": {**INT8, "smooth": True}}, mask="causal")
    float_k = back(k.float(), order, smooth=True)
    expected = attended("reference", (back(q.float(), order), float_k, v.float()), "causal")
    assert_within_budget(attended(target, given, slots), expected, attended("torch", given, slots))


def test_an_order_in_which_tokens_are_alike_errs_half_as_much() -> None:
    """Keys of one column stand out in a channel that no query asks for: they cost nothing but their neighbors' scales."""
    given = torch.randn(3, 1, 2, LENGTH, 16, generator=torch.Generator().manual_seed(0)).unbind()
    given[0][..., 0], given[1][:, :, ::COLUMNS, 0] = 0, 50
    exact, storage = attended("reference", given, "all"), {"qk": {"type": "int8", "per": f"block({COLUMNS})"}}
    errors = {
        order: float((attended("cpp", given, slots_of(order, storage, mask="all")) - exact).norm() / exact.norm())
        for order in ("axes(1, 0)", None, "random(seed=0)")
    }
    assert 0 < errors["axes(1, 0)"] < errors[None] / 2
    assert errors["axes(1, 0)"] < errors["random(seed=0)"]


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_types_that_cut_blocks_of_keys_themselves_follow_the_order(kind: str) -> None:
    """Where every query sees all keys, moving these changes nothing but who shares scales."""
    q, k, v = given = qkv()
    order = ORDERS["tiles(4, 4)"]
    found = attended("reference", given, slots_of("tiles(4, 4)", {"pv": kind}))
    expected = attended("reference", (q, k[:, :, order], v[:, :, order]), {"storage": {"pv": kind}})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, attended("reference", given, {"storage": {"pv": kind}}), rtol=1e-3, atol=1e-4)
    assert_within_budget(attended("torch", given, slots_of("tiles(4, 4)", {"pv": kind})), found, expected)


@pytest.mark.parametrize("target", ["torch", "cpp"])
def test_a_cache_s_numbers_follow_the_order_where_nothing_holds_them(target: str) -> None:
    q, k, v = given = qkv()
    order = ORDERS["axes(1, 0)"]
    slots = slots_of(storage={"kv_cache": INT8, "qk": "int8"}, mask="causal")
    inner = {"mask": "causal", "storage": {"qk": "int8"}}
    made = (q, back(k, order), back(v, order))
    assert_within_budget(attended(target, given, slots), attended("reference", made, inner), attended("torch", made, inner))


@pytest.mark.parametrize("target", ["reference", "torch", "cpp"])
def test_heads_have_orders_of_their_own(target: str) -> None:
    """As PARO attention chooses them; heads 1 and 2 share no keys, heads 0 and 1 do."""
    q, k, v = given = qkv()
    slots = slots_of("axes(1, 0)", mask="causal", heads={"1:3": {"order": "tiles(4, 4)"}})
    found = attended(target, given, slots)
    for heads, order in ((slice(1, 3), "tiles(4, 4)"), (slice(0, 1), "axes(1, 0)"), (slice(3, 4), "axes(1, 0)")):
        made = (back(q, ORDERS[order]), back(k, ORDERS[order]), v)
        expected, plain = (attended(one, made, "causal")[:, heads] for one in ("reference", "torch"))
        assert_within_budget(found[:, heads], expected, plain)


@pytest.mark.parametrize("target", ["reference", "torch", "cpp"])
def test_tokens_are_ranked_by_their_positions(target: str) -> None:
    """Fewer queries than keys, and keys that stand elsewhere in each row."""
    q, k, v = qkv(q_len=33)
    order, mixed = ORDERS["axes(1, 0)"], torch.stack([torch.tensor(SHUFFLED), torch.tensor(SHUFFLED).flip(0)])
    of_q = [n - (LENGTH - 33) for n in order if n >= LENGTH - 33]
    expected, plain = (attended(one, (back(q, of_q), back(k, order), v), "causal") for one in ("reference", "torch"))
    at_last = torch.arange(LENGTH - 33, LENGTH)
    moved = [torch.stack([x[b, :, mixed[b]] for b in range(2)]) for x in (k, v)]
    slots = slots_of(mask="causal")
    assert_within_budget(attended(target, (q, k, v), slots), expected, plain)
    found = attended(target, (q, *moved), slots, q_positions=at_last[None].expand(2, -1), k_positions=mixed)
    assert_within_budget(found, expected, plain)


def test_gradients_pass_as_if_nothing_was_rounded() -> None:
    given = tuple(x.double().requires_grad_() for x in qkv())
    order = ORDERS["axes(1, 0)"]
    q, k, v = given
    passed = [x + (back(x.detach().float(), order).double() - x.detach()) for x in (q, k)]
    found = torch.autograd.grad(attended("torch", given, slots_of(mask="causal")).square().sum(), given)
    expected = torch.autograd.grad(attended("reference", (*passed, v), "causal").square().sum(), given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("q_len", "k_len"), [(0, 0), (1, 1), (1, LENGTH), (3, 0)])
def test_lengths_of_any_kind(q_len: int, k_len: int) -> None:
    given, slots = qkv(q_len, k_len), {"order": "table(shuffled)", "storage": {"qk": INT8}}
    exact = attended("reference", given, slots)
    for target in ("torch", "cpp"):
        assert_within_budget(attended(target, given, slots), exact, attended("torch", given, slots))


def site(**changes: Any) -> Site:
    one = Site(
        "attn", Kind.SELF, Phase.PREFILL, 0, 1, 1, 4, 4, LENGTH, LENGTH, 16, 16, "float32", variant_of("all"), Frame(), LENGTH,
        LENGTH,
    )  # fmt: skip
    return replace(one, **changes)


def resolved(slots: dict[str, Any], **changes: Any) -> Any:
    read = read_slots(entry_of(slots), Naming(attn.library.words(), strict=False))
    assert read is not None
    return resolve(read, site(**changes))


def test_an_order_is_part_of_what_is_computed_only_where_blocks_of_tokens_are() -> None:
    assert resolved(slots_of(storage={"qk": "int8", "pv": "int8"})).order is None
    assert resolved(slots_of(storage={"qk": "nvfp4"})).order is None  # its blocks are those of channels
    held = resolved(slots_of())
    assert held.order is not None
    assert held.held(replace(held.storage, qk=None)).order is None
    assert wire.read(wire.write(held)) == replace(held, derived=())
    first = e.table("first", e.b)
    padded = resolved(slots_of(), frame=Frame(first_key=first)).order
    assert padded != held.order
    assert simplify(padded.substitute({first: e.const(0)})) == simplify(held.order)


@pytest.mark.parametrize(
    ("changes", "more", "reason"),
    [
        ({"frame": None}, {}, "nobody knows where this site's queries stand"),
        ({"frame": Frame(slides=True)}, {}, "its oldest keys are gone"),
        ({}, {"context": ["pool(2)"]}, "an order asks where keys stand"),
        (
            {"computes": replace(variant_of("all"), mask=e.table("m", e.b, e.i, e.k, sort=e.Sort.BOOL))},
            {},
            "padding cannot be told",
        ),
    ],
)
def test_an_order_that_nobody_could_follow_is_refused(changes: dict[str, Any], more: dict[str, Any], reason: str) -> None:
    found = resolved(slots_of(**more), **changes)
    assert isinstance(found, Refusal)
    assert reason in found.reason


def test_nothing_asks_where_keys_stand_that_an_earlier_rule_pooled() -> None:
    pooled = variant_of({"context": ["pool(2)"]})
    for slots in (slots_of(), {"mask": "causal"}):
        found = resolved(slots, computes=pooled)
        assert isinstance(found, Refusal)
        assert "asks where keys stand" in found.reason
    assert resolved({"storage": {"qk": "int8"}}, computes=pooled).context == pooled.context


def test_who_cuts_blocks_as_they_come_refuses_an_order() -> None:
    q, k, v = qkv()
    held = {"type": "int8", "per": f"block({SIZE})"}
    codes = (attn.encode(k, held), attn.encode(v, held))
    with pytest.raises(ShapeError, match="blocks of tokens as they come"):
        attn.attend(q, *codes, slots_of(storage={"kv_cache": held}))
    assert attn.attend(q, *codes, {"storage": {"kv_cache": held}}).isfinite().all()  # type: ignore[union-attr]
    sizes = {"q_len": LENGTH, "k_len": LENGTH, "heads": 4, "head_dim": 16}
    with pytest.raises(ShapeError, match="leave the `order` out"):
        attn.kernel_source(slots_of(), target="triton", **sizes)  # type: ignore[arg-type]
    refused = PlainTarget().carry(site(), resolved(slots_of()))
    assert isinstance(refused, Refusal)
    assert "leave the `order` out" in refused.reason
    assert not isinstance(PlainTarget().carry(site(), resolved(slots_of(None))), Refusal)
    assert "does not carry" in str(uncarried(variant_of(slots_of(), length=LENGTH)))
    with pytest.raises(LanguageError, match="an order asks where keys stand"):
        attn.attend(q, k, v, slots_of(context=["pool(2)"]))
