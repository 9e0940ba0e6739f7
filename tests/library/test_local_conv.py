"""`local_conv` against convolutions written out by hand: on lines and grids, under masks, on targets, trained, exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_compiler as attn
from adaptation.small import VOCABULARY, Model
from attn_compiler import attend
from attn_compiler.algebra import wire
from attn_compiler.algebra.output import Local
from attn_compiler.errors import AttnError
from attn_compiler.planning.parameter_file import write_parameters
from attn_compiler.testing import Case, assert_case, assert_within_budget, check_variant, variant_of

HEADS, KV_HEADS, TOKENS, DIM = 4, 2, 35, 8
DISTANCE = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
CAUSAL = DISTANCE >= 0


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = (drawn(2, heads, TOKENS, DIM, seed=seed) for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
TABLES = {
    "local_conv": drawn(1, HEADS, DIM, 3, seed=3),
    "nine": drawn(1, HEADS, DIM, 9, seed=4),
    "cube": drawn(1, HEADS, DIM, 27, seed=5),
    "by_row": drawn(2, HEADS, DIM, 9, seed=6),
    "bias": drawn(1, HEADS, DIM, seed=7),
    "document": torch.tensor([0] * 9 + [1] * 20 + [2] * 6),
    "real": torch.arange(TOKENS) >= torch.tensor([[3], [0]]),
    "output_gate": drawn(2, HEADS, TOKENS, DIM, seed=8),
    "head_scale": drawn(1, HEADS, seed=9),
}
PADDED = CAUSAL & TABLES["real"][:, None, None]
SAME = TABLES["document"][:, None] == TABLES["document"]


def by_pairs(seen: Tensor, weights: Tensor, neighbors: Mapping[tuple[int, int], int], bias: Tensor | None = None) -> Tensor:
    """Attention where a mask says so, and beside it each neighbor that it shows, one pair of tokens after the other."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (K, V))
    seen = seen.expand(2, HEADS, TOKENS, TOKENS)
    out = (Q @ k.mT * DIM**-0.5).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num() @ v
    for (query, key), tap in neighbors.items():
        out[:, :, query] += torch.where(seen[:, :, query, key, None], weights[..., tap] * v[:, :, key], 0.0)
    return out if bias is None else out + bias[:, :, None]


def on_a_line(first: int, count: int) -> dict[tuple[int, int], int]:
    pairs = product(range(TOKENS), range(count))
    return {(q, q + first + tap): tap for q, tap in pairs if 0 <= q + first + tap < TOKENS}


def on_a_grid(sizes: tuple[int, ...], before: int = 0) -> dict[tuple[int, int], int]:
    places = {place: before + n for n, place in enumerate(product(*map(range, sizes)))}
    taps = {near: n for n, near in enumerate(product((-1, 0, 1), repeat=len(sizes)))}
    found = {}
    for place, q in places.items():
        for near, tap in taps.items():
            other = tuple(a + b for a, b in zip(place, near, strict=True))
            if other in places:
                found[q, places[other]] = tap
    return found


CASES: Mapping[str, tuple[Mapping[str, object], Tensor]] = {
    "the last tokens": (
        {"mask": "causal", "output": "local_conv(3)"}, by_pairs(CAUSAL, TABLES["local_conv"], on_a_line(-2, 3)),
    ),
    "on both sides": (
        {"mask": "all", "output": "local_conv(3, centered=True, bias=bias)"},
        by_pairs(CAUSAL | True, TABLES["local_conv"], on_a_line(-1, 3), TABLES["bias"]),
    ),
    "nothing ahead of a causal query": (
        {"mask": "causal", "output": "local_conv(3, centered=True)"},
        by_pairs(CAUSAL, TABLES["local_conv"], on_a_line(-1, 3)),
    ),
    "no padding": (
        {"mask": "causal & valid(real)", "output": "local_conv(3)"},
        by_pairs(PADDED, TABLES["local_conv"], on_a_line(-2, 3)),
    ),
    "no other document": (
        {"mask": "same(document)", "output": "local_conv(3, centered=True)"},
        by_pairs(SAME, TABLES["local_conv"], on_a_line(-1, 3)),
    ),
    "a grid": ({"geometry": [5, 7], "output": "local_conv(3, nine)"}, by_pairs(CAUSAL | True, TABLES["nine"], on_a_grid((5, 7)))),
    "a grid behind a class token": (
        {"geometry": "image", "output": "local_conv(3, nine)"},
        by_pairs(CAUSAL | True, TABLES["nine"], on_a_grid((2, 17), before=1)),
    ),
    "a grid in time": (
        {"geometry": [5, 1, 7], "mask": "causal", "output": "local_conv(3, cube)"},
        by_pairs(CAUSAL, TABLES["cube"], on_a_grid((5, 1, 7))),
    ),
    "windows of a grid, each row its own": (
        {"geometry": [5, 7], "mask": "chunks([5, 4])", "output": "local_conv(3, by_row, per_row=True)"},
        by_pairs(
            (torch.arange(TOKENS) % 7 // 4)[:, None] == torch.arange(TOKENS) % 7 // 4, TABLES["by_row"], on_a_grid((5, 7))
        ),
    ),
}  # fmt: skip


def read(slots: Mapping[str, object]) -> Case:
    if slots.get("geometry") == "image":  # which only a file can name
        plain = variant_of({**slots, "geometry": [2, 17]}, heads=HEADS, kv_heads=KV_HEADS, length=34, dim=DIM)
        (step,) = plain.output
        assert isinstance(step, Local)
        variant = replace(plain, output=(replace(step, before=1),))
    else:
        variant = variant_of(slots, heads=HEADS, kv_heads=KV_HEADS, length=TOKENS, dim=DIM)
    return Case(variant, Q, K, V, {name: TABLES[name] for name in variant.tables()})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", ["reference", "torch"])
def test_neighbors_that_a_query_sees_are_added_one_by_one(name: str, target: str) -> None:
    slots, expected = CASES[name]
    case = read(slots)
    found = attend(Q, K, V, case.variant, tables=case.tables, target=target)  # type: ignore[arg-type]
    assert isinstance(found, Tensor)
    assert_within_budget(found, expected, expected + drawn(1) * 1e-15)
    assert wire.read(wire.write(case.variant)) == case.variant


def test_what_pytorch_calls_a_convolution_is_the_same() -> None:
    laid_out = V.repeat_interleave(2, dim=1).mT.reshape(2, HEADS * DIM, 5, 7)
    kernel = TABLES["nine"].reshape(-1, 1, 3, 3)
    near = F.conv2d(laid_out, kernel, groups=len(kernel), padding=1).flatten(2).reshape(2, HEADS, DIM, TOKENS).mT
    case = read(CASES["a grid"][0])
    plain = attend(Q, K, V, {"mask": "all"})
    found = attend(Q, K, V, case.variant, tables=case.tables)
    assert isinstance(plain, Tensor)
    assert isinstance(found, Tensor)
    assert_within_budget(found, plain + near, plain + near + drawn(1) * 1e-15)


@pytest.mark.parametrize(("target", "dtype"), [("torch", torch.bfloat16), ("cpp", torch.float32)])
@pytest.mark.parametrize("name", CASES)
def test_targets_carry_it_with_its_gradients(name: str, target: str, dtype: torch.dtype) -> None:
    assert_case(read(CASES[name][0]), dtype, target)


STEPS: Mapping[str, Mapping[str, object]] = {
    "a norm and a gate": {"mask": "causal", "output": ["norm(rms)", "gate(silu)"]},
    "heads of their own": {
        "mask": "causal",
        "heads": {"0": {"output": "local_conv(3)"}, "rest": {"mask": "causal & window(5)", "output": "norm(rms)"}},
    },
    "few keys": {"context": "pool(4)", "output": "head_scale"},
    "agents": {"geometry": [5, 7], "context": "agents([2, 3])", "output": "local_conv(3, nine, bias)"},
    "linear": {"mask": "causal", "feature": "elu_one", "output": "local_conv(3)"},
    "a mix": {
        "mix": {"how": "sum", "branches": {"near": {"mask": "causal & window(4)"}, "far": {"mask": "causal", "feature": "relu"}}},
        "output": "local_conv(3)",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_what_stands_around_a_kernel_has_gradients(name: str) -> None:
    case, linear = read(STEPS[name]), {"feature", "mix"} & STEPS[name].keys()
    assert_case(case, torch.float32, "torch" if linear else "cpp")


def test_what_stands_around_a_kernel_stands_around_flex_attention() -> None:
    wide = read({"mask": "causal", "output": ["norm(rms)", "local_conv(3)"]})
    given = [x.float() for x in (wide.q, wide.k, wide.v)]
    tables = {name: x.float() for name, x in wide.tables.items()}
    exact, found, plain = (
        attend(*operands, wide.variant, tables=named, target=target)  # type: ignore[arg-type]
        for operands, named, target in (
            ((wide.q, wide.k, wide.v), wide.tables, "reference"), (given, tables, "flex"), (given, tables, "torch"),
        )
    )  # fmt: skip
    assert isinstance(exact, Tensor)
    assert isinstance(found, Tensor)
    assert isinstance(plain, Tensor)
    assert_within_budget(found, exact, plain)


def test_a_convolution_is_what_it_says_at_every_length() -> None:
    variant = variant_of({"mask": "causal", "output": "local_conv(4)"})
    check_variant(variant, tables={"local_conv": drawn(8, 4)})


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ({"geometry": "square", "output": "local_conv(3)"}, "whose sizes are numbers"),
        ({"geometry": [5, 8], "output": "local_conv(3)"}, "has 40 tokens, and this attention has 35 keys"),
        ({"output": "local_conv(0)"}, "at least 1"),
    ],
)
def test_what_has_no_neighbors_is_refused(slots: Mapping[str, object], said: str) -> None:
    with pytest.raises(AttnError, match=said):
        attend(Q, K, V, slots, tables=TABLES)


def test_keys_that_stand_anywhere_have_no_neighbors() -> None:
    places = torch.arange(TOKENS) * 2
    with pytest.raises(AttnError, match="keys that follow each other"):
        attend(Q, K, V, {"mask": "causal", "output": "local_conv(3)"}, tables=TABLES, k_positions=places)


def test_its_parameters_change_nothing_before_they_are_trained_and_go_to_a_file_and_back(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "version: 1\nparameters: taps.safetensors\nrules:\n  - match: {kind: self}\n    untrained: allow\n"
        "    attn: {output: 'local_conv(3, bias=shift)'}\n"
    )
    tokens = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    model = Model()
    adapted = attn.adapt(model, path, (tokens,))
    assert {name: list(x.shape) for name, x in adapted.learned.items()} == {"local_conv": [2, 2, 8, 3], "shift": [2, 2, 8]}
    with torch.no_grad():
        assert torch.allclose(adapted(tokens), model(tokens), atol=1e-5)
        for x in adapted.learned.values():
            x.add_(torch.randn(x.shape, generator=torch.Generator().manual_seed(2)))
        changed = adapted(tokens)
        assert not torch.allclose(changed, model(tokens), atol=1e-2)
        adapted.save()
        assert torch.allclose(attn.adapt(model, path, (tokens,))(tokens), changed, atol=1e-5)


class Image(nn.Module):
    """Nothing but an attention between the tokens of a grid."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_an_exported_one_is_a_convolution(tmp_path: Path) -> None:
    write_parameters(tmp_path / "taps.safetensors", {"nine": TABLES["nine"].float().numpy()}, 1)
    rule = {
        "match": {},
        "attn": {"geometry": [5, 7], "context": "agents(4)", "output": "local_conv(3, nine)"},
        "fallback": "error",
    }
    policy = {"version": 1, "parameters": str(tmp_path / "taps.safetensors"), "rules": [rule]}
    path = tmp_path / "image.onnx"
    report = attn.export_onnx(Image().eval(), (Q.float(),), path, policy)
    assert "checked in onnxruntime" in str(report)
    assert "Conv" in {node.op_type for node in onnx.load(path).graph.node}
