"""What Triton kernels become on GPUs that are not here: no spilled registers, tensor cores, loads of 16 bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product

import pytest

from attn_compiler.errors import CompilerError
from attn_compiler.runtime import triton_gradients
from attn_compiler.runtime.ahead import Compiled, Order, compile_ahead
from attn_compiler.runtime.kernel_source import shape_of
from attn_compiler.runtime.kernels import spec_at
from attn_compiler.runtime.triton_kernels import Blocks, candidates, kernels, visited
from attn_compiler.targets.operands import head_groups
from attn_compiler.targets.triton import gradient

pytest.importorskip("triton")

VARIANTS: Mapping[str, Mapping[str, object]] = {
    "window": {"mask": "causal & window(1024)"},
    "dense": {"mask": "all"},
    "sinks and softcap": {"mask": "causal & (window(1024) | sinks(4))", "score": "softcap(score, 50)"},
    "documents and alibi": {"mask": "causal & same(documents)", "score": "score + alibi"},
}
TENSOR_CORES = {"sm_80": ("HMMA",), "sm_90": ("HGMMA",), "sm_100": ("UTCHMMA",), "gfx942": ("v_mfma",)}
SPILLING = Blocks(128, 128, 4, 2)


def order(variant: str, dim: int, dtype: str, machine: str, blocks: Blocks) -> Order:
    shape = shape_of(VARIANTS[variant], q_len=4096, k_len=4096, heads=8, head_dim=dim, dtype=dtype)
    [kernel] = kernels(shape, blocks)
    tables = tuple((stored.dtype, stored.axes) for _, stored in kernel.spec.tables)
    return Order(kernel.text, dtype, tables, machine, blocks)


def backward(dim: int, *, by_key: bool) -> Order:
    """A backward kernel of a window, as it would be launched."""
    shape = shape_of(VARIANTS["window"], q_len=4096, k_len=4096, heads=8, head_dim=dim, dtype="bfloat16")
    [(members, variant)] = head_groups(shape.variant, shape.heads)
    spec, blocks = spec_at(shape, variant), Blocks()
    if by_key:
        blocks = triton_gradients.by_key_blocks(shape, blocks)
    tile = (blocks.keys, blocks.queries) if by_key else (blocks.queries, blocks.keys)
    iteration, _ = visited(shape, members, variant, spec, tile, by_key=by_key)
    text = (gradient.by_key if by_key else gradient.by_query)(spec, iteration, ())
    return Order(text, "bfloat16", (), "sm_90", blocks)


def is_clean(found: Compiled) -> bool:
    return found.stack == 0 and not found.count("LDL", "STL", "scratch_")


def on_tensor_cores(found: Compiled, machine: str) -> bool:
    return found.count(*TENSOR_CORES[machine]) > 0


def loads_in_whole(found: Compiled) -> bool:
    """Whether all that is copied ahead into shared memory comes in steps of 16 bytes."""
    copies = [name for name in found.opcodes if name.startswith("LDGSTS")]
    return bool(copies) and all("128" in name for name in copies)


@lru_cache(maxsize=1)
def quick() -> Sequence[Compiled]:
    return compile_ahead(
        [
            order("window", 64, "bfloat16", "sm_90", candidates("bfloat16", 64)[0]),
            order("window", 128, "bfloat16", "sm_90", candidates("bfloat16", 128)[0]),
            order("window", 128, "float16", "gfx942", candidates("float16", 128, amd=True)[0]),
            order("window", 128, "bfloat16", "sm_90", SPILLING),
            order("window", 64, "float32", "sm_90", Blocks(64, 32, 4, 2)),
            backward(64, by_key=False),
            backward(128, by_key=True),
        ]
    )


@pytest.mark.parametrize("which", [0, 1], ids=["64", "128"])
def test_a_kernel_for_hopper_spills_nothing_and_multiplies_in_warp_groups(which: int) -> None:
    found = quick()[which]
    assert is_clean(found)
    assert on_tensor_cores(found, "sm_90")
    assert not found.count("HMMA")
    assert loads_in_whole(found)
    assert found.shared <= 227 * 1024


@pytest.mark.parametrize("which", [5, 6], ids=["of q, 64", "of k and v, 128"])
def test_backward_kernels_for_hopper_spill_nothing(which: int) -> None:
    assert is_clean(quick()[which])
    assert on_tensor_cores(quick()[which], "sm_90")


def test_a_kernel_for_amd_spills_nothing_and_multiplies_matrices() -> None:
    assert is_clean(quick()[2])
    assert on_tensor_cores(quick()[2], "gfx942")


def test_tiles_that_are_too_large_are_seen_to_spill() -> None:
    assert not is_clean(quick()[3])


def test_float32_is_not_multiplied_in_less() -> None:
    assert not quick()[4].count("HGMMA", "HMMA")
    assert not on_tensor_cores(quick()[4], "sm_90")


def test_what_cannot_be_compiled_is_said() -> None:
    wrong = Order("import triton\n\n\n@triton.jit\ndef forward(q):\n    nothing\n", "float16", (), "sm_90", Blocks())
    with pytest.raises(CompilerError, match="Triton cannot compile a kernel"):
        compile_ahead([wrong])


@pytest.mark.full
@pytest.mark.parametrize("machine", TENSOR_CORES)
@pytest.mark.parametrize(("dim", "dtype"), list(product((64, 128), ("bfloat16", "float16"))))
@pytest.mark.parametrize("variant", VARIANTS)
def test_some_candidate_of_every_kernel_is_clean(variant: str, dim: int, dtype: str, machine: str) -> None:
    amd = machine == "gfx942"
    tried = compile_ahead([order(variant, dim, dtype, machine, blocks) for blocks in candidates(dtype, dim, amd=amd)])
    assert any(is_clean(found) and on_tensor_cores(found, machine) and (amd or loads_in_whole(found)) for found in tried)
