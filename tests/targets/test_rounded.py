"""What being held in few bits makes of numbers, against PyTorch's own types, tables by hand and Python's rounding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attn_compiler import library
from attn_compiler.algebra.storage import Held, Numbers, Scaling, Shared, Storage
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.planning.language import Scope, parse_call
from attn_compiler.runtime.attend import attend, reference
from attn_compiler.targets.rounded import held_tensor, held_weights
from attn_compiler.targets.scaled import nearest

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TYPES = ("int8", "int4", "fp8_e4m3", "fp8_e5m2", "nvfp4", "mxfp4", "bf16", "fp16")


def numbers(name: str) -> Numbers:
    found = parse_call(name, "storages", library.words(), Scope())
    assert isinstance(found, Numbers)
    return found


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def usual(name: str) -> Held:
    of_type = numbers(name)
    return Held(of_type, Shared("token") if of_type.scaling is Scaling.REAL else None)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2), ("bf16", torch.bfloat16), ("fp16", torch.float16),
    ],
)  # fmt: skip
def test_floats_are_rounded_bit_for_bit_as_pytorch_rounds_them(name: str, dtype: torch.dtype) -> None:
    largest = numbers(name).largest
    patterns = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    wild = patterns.to(torch.int32).view(torch.float32)
    x = torch.cat([wild[wild.isfinite()], drawn(1 << 14) * min(largest, 100.0), drawn(1 << 12) * 1e-4])
    x = torch.cat([x, torch.tensor([0.0, -0.0, largest, -largest])]).clamp(-largest, largest)
    halves = x.to(dtype).to(torch.float32) * (1 + 2.0 ** -(numbers(name).mantissa + 1))  # between two neighbors: to the even one
    x = torch.cat([x, halves.clamp(-largest, largest)])
    assert torch.equal(nearest(x, numbers(name)), x.to(dtype).to(torch.float32))


def test_floats_of_four_bits_are_those_of_the_table() -> None:
    x = torch.linspace(-7, 7, 2801)
    for given, found in zip(x.tolist(), nearest(x, numbers("nvfp4")).tolist(), strict=True):
        distances = [abs(abs(given) - each) for each in FP4]
        least = min(distances)
        near = [place for place, distance in enumerate(distances) if math.isclose(distance, least, abs_tol=1e-9)]
        even = next((place for place in near if place % 2 == 0), near[0])  # the code's last bit is that of the mantissa
        assert found == math.copysign(FP4[even], given)


@pytest.mark.parametrize(("name", "most"), [("int8", 127), ("int4", 7)])
def test_whole_numbers_are_those_of_the_formula(name: str, most: int) -> None:
    x = drawn(1, 1, 5, 16)
    found = held_tensor(x, usual(name))
    for row, back in zip(x[0, 0], found[0, 0], strict=True):
        largest = row.abs().max()
        codes = [round(each) for each in (row * (torch.tensor(float(most)) / largest)).tolist()]
        assert max(map(abs, codes)) == most
        assert torch.equal(back, torch.tensor(codes, dtype=torch.float32) * (largest / most))


def test_sixteen_floats_of_four_bits_share_a_scale_of_eight_bits() -> None:
    x = drawn(1, 1, 3, 40)
    found = held_tensor(x, usual("nvfp4"))
    whole = x.abs().max() / (6 * 448)
    for start in (0, 16, 32):  # the last block is short
        of_block = x[..., start : start + 16]
        scale = (of_block.abs().amax(-1, keepdim=True) / 6 / whole).to(torch.float8_e4m3fn).float() * whole
        codes = (found[..., start : start + 16] / scale).abs()
        assert all(min(abs(code - each) for each in FP4) < 1e-5 for code in codes.flatten().tolist())
        assert torch.all((found[..., start : start + 16] - of_block).abs() <= scale * 1.01)


def test_thirty_two_floats_of_four_bits_share_a_power_of_two() -> None:
    x = drawn(1, 1, 3, 64)
    found = held_tensor(x, usual("mxfp4"))
    for start in (0, 32):
        of_block = x[..., start : start + 32]
        scale = 2.0 ** (of_block.abs().amax(-1, keepdim=True).log2().floor() - 2)
        assert torch.equal(found[..., start : start + 32], nearest(of_block / scale, numbers("mxfp4")) * scale)


@pytest.mark.parametrize(
    ("per", "alike"),
    [
        (Shared("tensor"), lambda x: x.reshape(1, -1)),
        (Shared("head"), lambda x: x.flatten(2).flatten(0, 1)),
        (Shared("token"), lambda x: x.flatten(0, 2)),
        (Shared("channel"), lambda x: x.mT.flatten(0, 2)),
        (Shared("block", 8), lambda x: x.unflatten(2, (-1, 8)).flatten(3).flatten(0, 2)),
    ],
    ids=lambda x: str(x) if isinstance(x, Shared) else "",
)
def test_each_group_is_scaled_to_its_own_largest_number(per: Shared, alike: object) -> None:
    assert callable(alike)
    x = drawn(2, 3, 16, 4) * torch.logspace(-2, 2, 16)[:, None]
    groups, back = alike(x), alike(held_tensor(x, Held(numbers("int8"), per)))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    assert torch.all((back - groups).abs() <= scale * 0.50001)
    assert torch.allclose(back.abs().amax(-1), groups.abs().amax(-1), rtol=1e-6)


@pytest.mark.parametrize("name", TYPES)
def test_what_was_held_once_is_held_again_unchanged(name: str) -> None:
    once = held_tensor(drawn(1, 2, 8, 64), usual(name))
    torch.testing.assert_close(held_tensor(once, usual(name)), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", TYPES)
def test_zeros_stay_zeros_and_nothing_stays_nothing(name: str) -> None:
    assert torch.equal(held_tensor(torch.zeros(1, 1, 4, 64), usual(name)), torch.zeros(1, 1, 4, 64))
    assert held_tensor(torch.zeros(1, 1, 0, 64), usual(name)).shape == (1, 1, 0, 64)


def test_a_mean_that_is_kept_apart_costs_no_precision() -> None:
    x = drawn(1, 1, 64, 16)
    moved = x + 1000 * drawn(16, seed=1)
    smooth = replace(usual("int8"), smooth=True)
    error, plain = ((held_tensor(moved, how) - moved).abs().max() for how in (smooth, usual("int8")))
    assert error < 0.03 < 1 < plain


def test_channels_that_stand_out_are_kept_as_they_are() -> None:
    x = drawn(1, 1, 64, 16)
    x[..., 3] *= 50
    back = held_tensor(x, replace(usual("int8"), outliers=6.0))
    assert torch.equal(back[..., 3], x[..., 3])
    rest = [n for n in range(16) if n != 3]
    assert torch.equal(back[..., rest], held_tensor(x[..., rest], usual("int8")))


def test_weights_use_the_bit_of_the_sign_where_there_is_none() -> None:
    weights = drawn(1, 1, 4, 16).abs()
    largest = weights.amax(-1, keepdim=True)
    assert torch.equal(
        held_weights(weights, numbers("int8")), torch.round(weights * (torch.tensor(255.0) / largest)) * (largest / 255)
    )
    signed = torch.cat([weights, -weights], dim=-1)
    assert torch.equal(
        held_weights(signed, numbers("int8")), torch.round(signed * (torch.tensor(127.0) / largest)) * (largest / 127)
    )


@pytest.mark.parametrize("target", ["torch", "reference"])
@pytest.mark.parametrize("name", TYPES)
def test_attention_is_that_of_what_its_operands_become(name: str, target: str) -> None:
    q, k, v = (drawn(2, heads, 37, 32, seed=heads) for heads in (4, 2, 3))
    v = v[:, :2]
    how = usual(name)
    slots = {"mask": "causal & window(9)", "storage": {"qk": name, "kv_cache": name}}
    expected = reference(held_tensor(q, how), held_tensor(held_tensor(k, how), how), held_tensor(v, how), "causal & window(9)")
    found = attend(q, k, v, slots, target=target)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TYPES)
def test_weights_and_values_are_rounded_too(name: str) -> None:
    q, k, v = (drawn(1, 2, 48, 32, seed=seed) for seed in range(3))
    scores = (q @ k.mT / 32**0.5).masked_fill(~torch.ones(48, 48).tril().bool(), -math.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    how = Held(numbers(name), Shared("channel") if numbers(name).scaling is Scaling.REAL else None)
    rounded = held_weights(weights, numbers(name)) @ held_tensor(v, how, along=-2)
    found = attend(q, k, v, {"mask": "causal", "storage": {"pv": name}}, target="torch")
    exact = reference(q, k, v, {"mask": "causal", "storage": {"pv": name}})
    torch.testing.assert_close(found, rounded / weights.sum(-1, keepdim=True), rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)  # a weight between two codes may become either


def test_gradients_pass_as_if_nothing_was_rounded() -> None:
    slots = {"mask": "causal", "storage": {"qk": "int8", "pv": "fp8_e4m3"}}
    q, k, v = (drawn(1, 2, 24, 16, seed=seed).requires_grad_() for seed in range(3))
    found = torch.autograd.grad(attend(q, k, v, slots).square().sum(), (q, k, v))
    token, channel = usual("int8"), Held(numbers("fp8_e4m3"), Shared("channel"))
    held = [
        held_tensor(x, how, along).detach().requires_grad_()
        for x, how, along in ((q, token, -1), (k, token, -1), (v, channel, -2))
    ]
    expected = torch.autograd.grad(attend(*held, {"mask": "causal", "storage": {"pv": "fp8_e4m3"}}).square().sum(), held)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 0


UNUSUAL = (math.inf, -math.inf, math.nan, 3e38, -1e30, 500.0, 0.0)


@pytest.mark.filterwarnings("ignore:numbers beyond")
@pytest.mark.parametrize("name", [*TYPES, "smooth", "outliers", "largest"])
def test_whether_gradients_are_wanted_changes_no_number(name: str) -> None:
    how = usual(name if name in TYPES else "int8")
    how = {
        "smooth": replace(how, smooth=True),
        "outliers": replace(how, outliers=6.0),
        "largest": replace(how, largest=(2.0,)),
    }.get(name, how)
    x = drawn(9, 32)
    for at, number in enumerate(UNUSUAL):
        x[at, at] = number
    for hold in (lambda x: held_tensor(x, how), lambda x: held_tensor(x, how, -2), lambda x: held_weights(x.abs(), how.numbers)):
        with torch.no_grad():
            alone = hold(x)
        given = x.clone().requires_grad_()
        found = hold(given)
        assert torch.equal(found.detach().nan_to_num(-7.0), alone.nan_to_num(-7.0))
        assert torch.equal(found.isnan(), alone.isnan())
        slope = drawn(9, 32, seed=1)
        (straight,) = torch.autograd.grad(found, given, slope)
        finite = x.isfinite() & (x != 0)
        assert torch.equal(straight[finite].abs(), slope[finite].abs())
        assert not straight[~x.isfinite()].any()


def test_heads_may_be_held_each_in_its_own_way() -> None:
    q, k, v = (drawn(1, 4, 24, 16, seed=seed) for seed in range(3))
    slots = {"mask": "causal", "heads": {"0:2": {"storage": {"qk": "int4"}}, "2": {"storage": {"qk": "int8"}}}}
    found, exact = attend(q, k, v, slots), reference(q, k, v, "causal")
    coarse, fine, same = ((found - exact)[:, heads].abs().max() for heads in (slice(0, 2), slice(2, 3), slice(3, 4)))
    assert same < 1e-5 < fine < coarse


def test_targets_that_cannot_carry_a_storage_refuse_it() -> None:
    q, k, v = (drawn(1, 1, 32, 16, seed=seed) for seed in range(3))
    variant = Variant(storage=Storage(kv_cache=Held(numbers("int4"), Shared("token"))))
    with pytest.raises(ShapeError, match="does not carry `storage`"):
        attend(q, k, v, variant, target="flex")
