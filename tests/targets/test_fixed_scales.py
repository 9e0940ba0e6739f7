"""Scales that a policy fixes: the same for all that comes, what is beyond them cut off with a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.errors import PolicyError, RefusedError
from attn_compiler.planning.slots import read_slots
from attn_compiler.runtime.codes import encode
from attn_compiler.runtime.coding import coded
from attn_compiler.targets.cpp.coded import K_SCALE, Q_SCALE
from attn_compiler.targets.rounded import held_tensor
from attn_compiler.testing import assert_within_budget

BEYOND = r"numbers beyond the `largest` of 2 that a policy fixes were cut off"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3)


def by_hand(x: Tensor, largest: float, codes: int) -> Tensor:
    """Whole numbers of a scale, Python's rounding; beyond the largest, that one."""
    inverse = torch.tensor(float(codes)) / torch.tensor(largest)
    found = [min(max(round(each), -codes), codes) for each in (x * inverse).flatten().tolist()]
    return torch.tensor(found, dtype=torch.float32).reshape(x.shape) * (torch.tensor(largest) / codes)


def attend(q: Tensor, k: Tensor, v: Tensor, storage: Any = None, target: str = "auto") -> Tensor:
    found = attn.attend(q, k, v, {"mask": "causal", **({"storage": storage} if storage else {})}, target=target)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize(
    ("operand", "changed", "largest"), [("qk", (0, 1), (5.0, 3.5)), ("kv_cache", (1, 2), (3.5, 4.0)), ("pv", (2,), (4.0,))]
)
def test_each_operand_has_a_scale_of_its_own(operand: str, changed: tuple[int, ...], largest: tuple[float, ...]) -> None:
    given = [drawn(1, 2, 40, 16, seed=seed) for seed in range(3)]
    held = list(given)
    for at, most in zip(changed, largest, strict=True):
        held[at] = by_hand(given[at], most, 127)
    storage = {operand: {"type": "int8", "largest": list(largest)}}
    found = attend(given[0], given[1], given[2], storage, target="torch")
    q, k, v = held
    expected = with_rounded_weights(q, k, v) if operand == "pv" else attend(q, k, v, target="torch")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    kernel, exact = attend(given[0], given[1], given[2], storage), attend(given[0], given[1], given[2], target="reference")
    if operand == "pv":  # a kernel rounds weights beside the largest so far: no coarser, and not the same
        assert_within_budget(kernel, exact, found)
    else:
        torch.testing.assert_close(kernel, found, atol=1e-5, rtol=1e-5)


def with_rounded_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each row of weights in whole numbers up to 255; the mass is that of weights before they are rounded."""
    scores = (q @ k.mT / 4).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.round(weights * 255) / 255 @ v / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("storage", ["int8", "int4", "fp8_e4m3", "fp8_e5m2"])
def test_rows_of_codes_mean_the_same_and_are_read_as_they_lie(storage: str) -> None:
    q, k, v = drawn(1, 4, 1, 16), drawn(1, 2, 50, 16, seed=1), drawn(1, 2, 50, 16, seed=2)
    how = {"type": storage, "largest": 3}
    codes = [encode(x, how) for x in (k, v)]
    if storage in ("int8", "int4"):
        assert torch.equal(codes[0].decode(), by_hand(k, 3.0, {"int8": 127, "int4": 7}[storage]))
    found = attn.attend(q, codes[0], codes[1], "causal")
    expected = attn.attend(q, codes[0].decode(), codes[1].decode(), "causal", target="torch")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    pieces = encode(k[:, :, :20], how).append(k[:, :, 20:])
    assert torch.equal(pieces.rows, codes[0].rows)


def test_what_is_beyond_is_cut_off_and_told() -> None:
    x = torch.tensor([[[[2.0, -2.0, 0.5, 0.0]]]])
    how = {"type": "int8", "largest": 2}
    assert torch.equal(encode(x, how).decode(), by_hand(x, 2.0, 127))
    for beyond in (x * 1.01, x * float("inf"), x * float("nan")):
        with pytest.warns(RuntimeWarning, match=BEYOND):
            encode(beyond, how)
    with pytest.warns(RuntimeWarning, match=BEYOND):
        found = attend(*[3 * drawn(1, 1, 4, 4)] * 3, {"qk": how}, target="torch")
    cut = (3 * drawn(1, 1, 4, 4)).clamp(-2, 2)
    torch.testing.assert_close(found, attend(*[by_hand(cut, 2.0, 127)] * 2, 3 * drawn(1, 1, 4, 4), target="torch"))


def test_a_compiled_graph_tells_it_too() -> None:
    @torch.compile
    def compiled(x: Tensor) -> Tensor:
        return attend(x, x, x, {"qk": {"type": "int8", "largest": 2}}, target="torch")

    compiled(drawn(1, 1, 8, 4).clamp(-2, 2))
    with pytest.warns(RuntimeWarning, match=BEYOND):
        found = compiled(3 * drawn(1, 1, 8, 4))
    cut = by_hand((3 * drawn(1, 1, 8, 4)).clamp(-2, 2), 2.0, 127)
    torch.testing.assert_close(found, attend(cut, cut, 3 * drawn(1, 1, 8, 4), target="torch"))


def test_gradients_pass_as_if_nothing_was_rounded() -> None:
    x = drawn(1, 1, 8, 4).requires_grad_()
    attend(x, x, x, {"kv_cache": {"type": "int8", "largest": 3}}, target="torch").sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("storage", "says"),
    [
        ({"type": "int8", "largest": []}, "one number, or one for each"),
        ({"type": "int8", "largest": [1, 2, 3]}, "one number, or one for each"),
        ({"type": "bf16", "largest": 1}, "of a type with scales"),
        ({"type": "nvfp4", "largest": 1}, "of a type with scales"),
        ({"type": "int8", "largest": 0}, "a number above 0"),
        ({"type": "int8", "largest": float("inf")}, "not infinity"),
        ({"type": "int8", "largest": [1, "x"]}, "a number above 0"),
        ({"type": "int8", "largest": 1, "per": "token"}, "that of the whole tensor"),
        ({"type": "int8", "largest": 1, "smooth": True}, "that of the whole tensor"),
    ],
    ids=str,
)
def test_what_cannot_be_fixed_is_refused(storage: dict[str, object], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        attend(*[drawn(1, 1, 4, 4)] * 3, {"qk": storage})
    assert says


def test_of_weights_and_values_only_these_have_a_largest_number() -> None:
    with pytest.raises(PolicyError, match="that of v: give one"):
        attend(*[drawn(1, 1, 4, 4)] * 3, {"pv": {"type": "int8", "largest": [1, 2]}})


def test_files_of_plain_operators_refuse_what_they_could_not_warn_of(tmp_path: Path) -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    given = tuple(drawn(1, 2, 16, 8, seed=seed) for seed in range(3))
    rule = {"match": {}, "attn": {"storage": {"qk": {"type": "int8", "largest": 3}}}, "fallback": "error"}
    with pytest.raises(RefusedError, match="a file cannot warn of what scales cut off"):
        attn.export_pt2(Model().eval(), given, tmp_path / "model.pt2", {"version": 1, "rules": [rule]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", ["int8", "int4"])
@pytest.mark.parametrize("strange", [None, torch.nan, torch.inf])
@torch.no_grad()
def test_kernels_are_given_the_codes_of_the_emulation(dtype: torch.dtype, numbers: str, strange: float | None) -> None:
    """Numbers beyond, NaN and infinities too: bit for bit, and with the same warning."""
    given = [drawn(2, 3, 37, 24, seed=seed).to(dtype) for seed in range(3)]
    if strange:
        for x in given:
            x[1, 2, 5, 7] = strange
    fixed = {"type": numbers, "largest": 2}
    policy = attn.load_policy({"version": 1, "rules": [{"attn": {"storage": {"qk": fixed, "pv": fixed}}}]})
    storage = read_slots(policy.rules[0].attn, policy.naming).storage
    with pytest.warns(RuntimeWarning, match=BEYOND):
        found = coded(*given, storage)
    scales = {name: scale[..., None] for name, scale in found.tables}
    assert found.value_scale is not None
    back = (
        (found.q ^ 128).view(torch.int8) * scales[Q_SCALE],
        (found.k ^ 128).view(torch.int8) * scales[K_SCALE],
        found.v * found.value_scale[:, :, None],
    )
    with pytest.warns(RuntimeWarning, match=BEYOND):
        wanted = [
            held_tensor(x, how.of(n % 2))
            for n, (x, how) in enumerate(zip(given, (storage.qk, storage.qk, storage.pv), strict=True))
        ]
    for name, mine, its in zip("qkv", back, wanted, strict=True):
        if name == "v" and its.isnan().any():  # any query meets it, be its weight zero
            assert mine[1, 2].isnan().all()
            mine, its = mine[0], its[0]
        assert torch.equal(mine.nan_to_num(9e9), its.nan_to_num(9e9))


def test_kernels_multiply_codes_of_fixed_scales() -> None:
    q, k, v = (drawn(1, 2, 300, 32, seed=seed) for seed in range(3))
    fixed = {"type": "int8", "largest": 3}
    for storage in ({"qk": fixed}, {"qk": fixed, "pv": fixed}):
        found, wanted = (attend(q, k, v, storage, target=target) for target in ("cpp", "torch"))
        assert_within_budget(found, attend(q, k, v, target="reference"), wanted)
    torch.testing.assert_close(
        attend(q, k, v, {"qk": fixed}, "cpp"), attend(q, k, v, {"qk": fixed}, "torch"), atol=1e-5, rtol=1e-5
    )
    with pytest.warns(RuntimeWarning, match=BEYOND):
        attend(q, k, v, {"qk": fixed | {"largest": 2}}, target="cpp")
