"""What int8 costs here and elsewhere: errors on the same tensors, beside torchao's quantizer and SageAttention 1's kernels.

    python benchmarks/quantized_beside.py FOLDER

Writes `quantized_beside.md` to FOLDER. Peers are there where they are importable (`pip install --no-deps torchao sageattention`);
SageAttention's kernels run in Triton's interpreter, so that nothing here says how fast anything is. q, k, v: 2 heads of 64, 512
tokens, causal; `shifted`: four channels of k moved by eight standard
deviations. Errors are relative, against the operands as they come.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

import attn_compiler as attn
from _tables import markdown, processor
from attn_compiler.runtime.interpreter import mend
from quantized import SHIFTED

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
PEERS = ("torchao", "sageattention")
CAUSAL = {"mask": "causal"}
SAGE = {"qk": {"type": "int8", "per": "block(64)", "smooth": True}, "pv": "fp16"}
OURS = {
    "int8 q·k as SageAttention has them, fp16 p·v": SAGE,
    "int8 q·k per token, smoothed, int8 p·v": {"qk": {"type": "int8", "smooth": True}, "pv": "int8"},
    "int8 q·k per token, int8 p·v": {"qk": "int8", "pv": "int8"},
    "int8 q·k per token, p·v as they come": {"qk": "int8"},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    given = options.parse_args()
    torch.set_grad_enabled(False)
    q, k, v = torch.randn(3, 1, 2, 512, 64, generator=torch.Generator().manual_seed(0))
    shifted = k.clone()
    shifted[..., SHIFTED] += 8
    ways: dict[str, Attention] = {f"attn: {name}": ours(storage) for name, storage in OURS.items()} | peers()
    rows = [
        {"held": name, **{to: error(way, q, keys, v) for to, keys in (("error", k), ("error, shifted", shifted))}}
        for name, way in ways.items()
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *PEERS) if name in sys.modules)
    text = f"# Errors of int8 attention, here and elsewhere\n\nOn {processor()}, {versions}.\n\n{markdown(rows)}"
    given.folder.mkdir(parents=True, exist_ok=True)
    (given.folder / "quantized_beside.md").write_text(text)
    print(text)


def error(way: Attention, q: Tensor, k: Tensor, v: Tensor) -> str:
    exact = attn.reference(q, k, v, "causal")
    assert isinstance(exact, Tensor)
    return f"{float((way(q, k.clone(), v) - exact).norm() / exact.norm()):.1e}"


def ours(storage: dict[str, object]) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attn.attend(q, k, v, {**CAUSAL, "storage": storage}, target="torch")
        assert isinstance(out, Tensor)
        return out

    return attend


def peers() -> dict[str, Attention]:
    """Those that can be imported."""
    found: dict[str, Attention] = {}
    for name, of in zip(PEERS, (torchao, sage), strict=True):
        try:
            import_module(name)
        except ImportError as reason:
            print(f"without {name}: {reason}")
        else:
            found |= of()
    return found


def torchao() -> dict[str, Attention]:
    """Symmetric int8 as torchao's affine quantizer has it, a scale for each token of q and k."""
    primitives = import_module("torchao.quantization.quant_primitives")

    def rounded(x: Tensor) -> Tensor:
        block = (1, 1, 1, x.shape[-1])
        kind = primitives.MappingType.SYMMETRIC
        scale, zero = primitives.choose_qparams_affine(x, kind, block, torch.int8, -127, 127)
        codes = primitives.quantize_affine(x, block, scale, zero, torch.int8, -127, 127)
        numbers = primitives.dequantize_affine(codes, block, scale, zero, torch.int8, -127, 127)
        assert isinstance(numbers, Tensor)
        return numbers

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attn.reference(rounded(q), rounded(k), v, "causal")
        assert isinstance(out, Tensor)
        return out

    return {"torchao: int8 q and k per token": attend}


def sage() -> dict[str, Attention]:
    """The kernels of SageAttention 1, without its assertion that tensors lie on a GPU."""
    quantize = import_module("sageattention.quant_per_block").per_block_int8
    forward = import_module("sageattention.attn_qk_int8_per_block_causal").forward

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_codes, q_scale, k_codes, k_scale = quantize(q, k - k.mean(dim=2, keepdim=True))
        out = forward(q_codes, k_codes, v.half(), q_scale, k_scale, output_dtype=torch.float32)
        assert isinstance(out, Tensor)
        return out

    mend()
    return {"SageAttention 1: int8 q·k per block, smoothed, fp16 p·v": attend}


if __name__ == "__main__":
    main()
