"""Every word for masks, scores and normalizers as Triton kernels, forward and backward, against the float64 reference."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from attn_compiler import library
from attn_compiler.algebra.variant import Variant
from attn_compiler.runtime.call import operands_of
from attn_compiler.runtime.reading import read_variant
from attn_compiler.runtime.triton import TritonTarget
from attn_compiler.testing import Case, assert_case

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is missing"),
    pytest.mark.usefixtures("small_tiles"),
]

N, HEADS, KV_HEADS, DIM = 36, 2, 1, 8
QUICK = 13  # every so many cases are run each time, the others in the full sweep
MASKS = (
    "all", "none", "causal", "causal(offset=-2)", "window(3)", "window(9, 2)", "window(2, of=block(4))", "window(2, of=doc)",
    "causal & (window(9) | sinks(4))", "prefix(length)", "offsets('-2, 0:20:3')", "queries('0:4, -1')", "keys('1::5')",
    "same(doc)", "before(doc)", "valid(pad)", "chunks(5, shift=3)", "causal & dilated(3)", "strided(4, 3, head_step=2, offset=1)",
    "powers(2)", "blocks(bits, 4)", "pairs(map)", "span(spans_a, spans_b, round=4)", "permuted(window(5), random(3))",
    "chunks([3, 3], shift=[1, 1])", "neighborhood([3, 5], edge='shift')", "neighborhood([3, 5], edge='clip')",
    "neighborhood([3, 5], edge='wrap')", "neighborhood([3, 3], dilation=2)", "ball(2)",
)  # fmt: skip
SCORES = (
    "softcap(score, 5)", "score + alibi()", "score + alibi(slopes)", "score + relative(distances)",
    "score + buckets(near, 16, count=8)", "score + decay(slopes)", "score + add_keys('0:4', 2.0)",
    "score + scale_keys('0:4', 1.5)", "score + gaussian(4.0)", "cosine(0.2)", "cosine(slopes)",
)  # fmt: skip
NORMALIZERS = (
    "softmax", "softmax(sink=logits)", "softmax_one", "sigmoid", "sigmoid(bias=-1)", "relu", "relu(divide=4)",
    "linear(none)", "linear(sum)", "linear(clamp(100))", "linear(mean)", "linear(subtract)", "local_linear(ridge=1)",
)  # fmt: skip
ASKED: Mapping[str, Mapping[str, object]] = {
    **{text: {"mask": text} for text in MASKS},
    **{text: {"mask": "causal", "score": text} for text in SCORES},
    **{text: {"mask": "causal & window(20)", "normalizer": text} for text in NORMALIZERS},
}
REFUSED = {
    "linear(mean)": "it does not count the keys that a query sees",
    "linear(subtract)": "it does not count the keys that a query sees",
    "local_linear(ridge=1)": "solves no system of equations for each query",
}


@cache
def tables() -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    place = torch.arange(N)
    return {
        "doc": place // 7,
        "pad": place % 7 != 3,
        "length": torch.tensor([9, 2]),
        "map": (3 * place[:, None] + place) % 4 == 0,
        "bits": (place[:HEADS, None, None] + place[: N // 4, None] + place[: N // 4]) % 2 == 0,
        "spans_a": torch.tensor([-2.0, 3.5], dtype=torch.float64),
        "spans_b": torch.tensor([0.5, 0.25], dtype=torch.float64),
        "slopes": drawn(HEADS).abs() + 0.1,
        "distances": drawn(HEADS, 2 * N - 1),
        "near": drawn(HEADS, 8),
        "logits": drawn(HEADS),
    }


def case_of(name: str) -> Case:
    asked = dict(ASKED[name])
    if any(word in name for word in ("[", "ball", "neighborhood")):
        asked["geometry"] = [6, 6]
    variant = read_variant(
        asked, Variant(), heads=HEADS, kv_heads=KV_HEADS, q_len=N, k_len=N, head_dim=DIM, values=None, layer=0, layers=1
    )
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, HEADS, N, DIM), (2, KV_HEADS, N, DIM), (2, KV_HEADS, N, DIM))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    if "linear" in name:  # whose weights are scores, and have to be positive
        q, k = q.abs(), k.abs()
    return Case(variant, q, k, v, {table: x for table, x in tables().items() if table in variant.tables()})


def quick(number: int, name: str) -> object:
    return name if number % QUICK == 0 else pytest.param(name, marks=pytest.mark.full)


@pytest.mark.parametrize("name", [quick(n, name) for n, name in enumerate(name for name in ASKED if name not in REFUSED)])
def test_a_word_means_what_the_reference_says(name: str) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    assert_case(case_of(name), dtypes[list(ASKED).index(name) % 3], "triton")


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_computes_is_refused(name: str) -> None:
    case = case_of(name).to(torch.float32)
    operands = operands_of(case.q, case.k, case.v, case.variant, case.tables, None, None, 0, 1, False)
    assert REFUSED[name] in str(TritonTarget().refuse(operands, case.variant))


@pytest.mark.parametrize("folder", ["masks", "scores", "normalizers"])
def test_every_word_is_asked(folder: str) -> None:
    written = " ".join(str(slot) for asked in ASKED.values() for slot in asked.values())
    assert [word for word in library.words()[folder] if word not in written] == []
