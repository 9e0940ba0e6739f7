"""The Triton kernels of linear attention as a program of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.errors import ShapeError
from attn_compiler.runtime import triton_programs
from attn_compiler.runtime.triton_launch import load
from attn_compiler.testing import assert_all_within_budget

pytest.importorskip("triton")

LINEAR = {"feature": "elu_one", "mask": "causal"}


def source(slots: object, *, tokens: int = 160, dtype: str = "float32") -> str:
    return attn.kernel_source(
        slots, q_len=tokens, k_len=tokens, heads=2, kv_heads=1, head_dim=8, dtype=dtype, target="triton"  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("gate", ["", "scalar", "vector"])
def test_what_is_printed_runs_alone_and_gathers(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_programs, "SEGMENT", 32)
    program = load(source(LINEAR | ({"state": f"gate({gate})"} if gate else {})))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 160, 8, generator=generator) for heads in (2, 1, 1))
    rates = {"": 0.0, "scalar": 1.0, "vector": torch.linspace(0.5, 2, 8)}[gate]
    log = -torch.rand(1, 2, 160, 1, generator=generator, dtype=torch.float64).cumsum(2) * rates
    logs = {"": (), "scalar": (log[..., 0],) * 2, "vector": (log,) * 2}[gate]

    def gathered(real: torch.dtype) -> list[Tensor]:
        left = (log[:, :, :, None] - log[:, :, None]).clamp(max=0).exp().to(real)
        weights = (q.to(real)[:, :, :, None] * k.to(real)[:, :, None] * left).sum(-1).tril()
        return [weights @ v.to(real), weights.sum(-1)]

    found = list(program.attend(q, k, v, *logs))
    assert_all_within_budget(found, gathered(torch.float64), lambda: gathered(torch.float32), ["sums", "masses"])


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_lines_are_short_and_no_hole_is_left(dtype: str, gate: str) -> None:
    lines = source(LINEAR | {"state": f"gate({gate})"}, dtype=dtype).splitlines()
    assert all(len(line) <= 130 for line in lines)
    left = ("# <", "from tiles", "if FADES", "if ROWS_FADE", "if COLUMNS_FADE")
    assert not any(line.strip().startswith(left) for line in lines if "logs" not in line)
    assert ('"tf32"' in "\n".join(lines)) == (dtype == "float16")


def test_mixes_and_delta_rules_have_no_kernel_to_print() -> None:
    near = {"mask": "causal & window(8)"}
    with pytest.raises(ShapeError, match="the target triton: it does not carry"):
        source(LINEAR | {"state": "delta"})
    with pytest.raises(ShapeError, match="the target triton: it does not carry"):
        source({"mix": {"how": "sum", "branches": {"near": near, "far": LINEAR}}})
