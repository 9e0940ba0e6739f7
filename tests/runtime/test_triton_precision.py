"""Products of float32: exact, unless PyTorch is asked for TF32. The interpreter cuts operands of such products as that does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.runtime.ahead import compile_ahead
from attn_compiler.runtime.kernel_source import shape_of
from attn_compiler.runtime.kernels import Shape
from attn_compiler.runtime.triton_orders import order
from attn_compiler.targets.triton.blocks import KINDS, Blocks, Kind, candidates
from attn_compiler.targets.triton.precision import TF32
from attn_compiler.testing.budget import over_budget
from attn_compiler.testing.case import Case, drawn_case, on, plain, with_gradients

pytest.importorskip("triton")

EXACT, LESS = "highest", "high"  # what is asked of products of float32
BIASED = {"mask": "causal & window(30)", "score": "score + relative(bias, 80)"}
ASKED: Mapping[str, tuple[Mapping[str, object], int]] = {  # and so many queries
    "many queries": (BIASED, 70),
    "few queries": (BIASED, 1),
    "linear": ({"mask": "causal", "feature": "elu_one"}, 70),
}


@contextmanager
def asked_for(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def case_of(name: str) -> Case:
    slots, q_len = ASKED[name]
    tables = {"bias": torch.randn(4, 159, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    return drawn_case(slots, tables, q_len, 70, dim=16).to(torch.float32)


def erring(name: str, precision: str, as_exact_as: torch.dtype) -> list[str]:
    """What errs more than that which is plainly computed in a dtype."""
    case = case_of(name)
    with torch.set_grad_enabled(case.q.shape[2] > 1):  # few queries have kernels of their own, where none wants a gradient
        with asked_for(precision):
            actual = with_gradients(on("triton"), case)
        exact = with_gradients(on("reference"), case.to(torch.float64))
        names = ["output", *(f"gradient of {one}" for one in case.names())][: len(actual)]
        return over_budget(actual, exact, lambda: with_gradients(plain, case.to(as_exact_as)), names)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ASKED)
def test_float32_is_exact_unless_tf32_is_asked_for(name: str) -> None:
    assert not erring(name, EXACT, torch.float32)
    assert erring(name, LESS, torch.float32)
    assert not erring(name, LESS, torch.float16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrower_numbers_are_multiplied_as_they_are(dtype: str) -> None:
    sources = []
    for precision in (EXACT, LESS):
        with asked_for(precision):
            sources.append(attn.kernel_source(BIASED, q_len=64, k_len=64, heads=1, head_dim=16, dtype=dtype, target="triton"))
    assert sources[0] == sources[1]
    assert '"tf32"' not in sources[0]


@pytest.mark.parametrize("q_len", [64, 1])
def test_the_printed_kernel_says_as_what_it_multiplies(q_len: int) -> None:
    for precision, said, unsaid in ((EXACT, '"ieee"', '"tf32"'), (LESS, '"tf32"', '"ieee"')):
        with asked_for(precision):
            source = attn.kernel_source("causal", q_len=q_len, k_len=64, heads=1, head_dim=16, target="triton")
        assert said in source
        assert unsaid not in source
        assert "DTYPE = torch.float32" in source


def shapes(dim: int = 64, few: bool = False) -> tuple[Shape, Shape]:
    """Of a call, as it is and where TF32 is asked for."""
    found = []
    for precision in (EXACT, LESS):
        with asked_for(precision):
            found.append(shape_of(BIASED, q_len=1 if few else 4096, k_len=4096, heads=2, head_dim=dim, target="triton"))
    return found[0], found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_no_kernel_of_one_precision_serves_for_the_other(kind: Kind) -> None:
    """Launches are kept by shape, modules by text, and what was measured by the texts that were asked about."""
    exact, less = shapes(few=kind == "decode")
    assert exact != less
    texts = [order(one, kind, Blocks(), "sm_90", wanted=("bias",)).text for one in (exact, less)]
    assert texts[1] == texts[0].replace('"ieee"', '"tf32"') != texts[0]


def test_a_compiled_graph_obeys_the_switch_when_it_runs() -> None:
    torch.compiler.reset()
    x = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0))

    def attended(x: Tensor) -> Tensor:
        out = attn.attend(x, x, x, "causal", target="triton")
        assert isinstance(out, Tensor)
        return out

    compiled, found = torch.compile(attended, backend="aot_eager", fullgraph=True), {}
    for precision in (EXACT, LESS, EXACT):
        with asked_for(precision):
            found[precision] = compiled(x)
            assert torch.equal(found[precision], attended(x))
    assert not torch.equal(found[EXACT], found[LESS])


@pytest.mark.parametrize("machine", ["sm_80", "sm_90"])
def test_tensor_cores_multiply_float32_where_tf32_is_asked_for_and_only_there(machine: str) -> None:
    exact, less = shapes()
    blocks = candidates("forward", TF32, 64, machine)[0]
    of_exact, of_less = compile_ahead([order(one, "forward", blocks, machine) for one in (exact, less)])
    assert of_less.on_tensor_cores(machine)
    assert all("TF32" in name for name in of_less.opcodes if name.startswith("HMMA"))
    assert not of_less.spills
    assert not of_exact.count("HMMA", "HGMMA")
