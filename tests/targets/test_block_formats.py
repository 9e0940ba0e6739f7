"""MXFP4 and NVFP4 bit for bit, beside their definitions computed in fractions, number by number."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from attn_compiler import library
from attn_compiler.algebra.storage import Held, Numbers
from attn_compiler.planning.language import Scope, parse_call
from attn_compiler.targets.rounded import held_tensor

E2M1 = tuple(map(Fraction, ("0", "1/2", "1", "3/2", "2", "3", "4", "6")))  # OCP Microscaling 1.0, 5.3.3
E4M3 = tuple(Fraction(m, 8) * Fraction(2) ** -6 for m in range(8)) + tuple(
    Fraction(8 + m, 8) * Fraction(2) ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
)


def nearest(x: Fraction, codes: tuple[Fraction, ...]) -> Fraction:
    """The code next to x, of two the one whose place, and so whose last bit, is even; beyond the largest, that one."""
    place = min(range(len(codes)), key=lambda at: (abs(codes[at] - abs(x)), at % 2))
    return codes[place] if x >= 0 else -codes[place]


def mxfp4(block: list[float], _: float) -> list[float]:
    """OCP Microscaling 1.0, 6.3: the scale is 2 to the exponent of the largest number, less that of 6."""
    largest = max(map(abs, block))
    scale = Fraction(2) ** (math.frexp(largest)[1] - 1 - 2)
    return [float(nearest(Fraction(x) / scale, E2M1) * scale) for x in block]


def nvfp4(block: list[float], whole: float) -> list[float]:
    """NVIDIA's: the scale of a block is its largest number over 6, over that of the tensor, in e4m3; each step in float32."""
    largest = torch.tensor(max(map(abs, block)))
    of_block = float(nearest(Fraction(float(largest / 6 / torch.tensor(whole))), E4M3))
    scale = torch.tensor(of_block) * torch.tensor(whole)
    codes = [nearest(Fraction(float(x / scale)), E2M1) if scale > 0 else 0 for x in torch.tensor(block)]
    return [float(torch.tensor(float(code)) * scale) for code in codes]


@pytest.mark.parametrize(("name", "size", "formula"), [("mxfp4", 32, mxfp4), ("nvfp4", 16, nvfp4)])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_a_block_is_what_its_definition_says(name: str, size: int, formula: object, spread: float) -> None:
    assert callable(formula)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 2, 24, 72, generator=generator) * (spread * torch.randn(1, 2, 24, 72, generator=generator)).exp()
    ties = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -5.0, -6.0, 0.26, 5.01, 1.0, 2.0])
    x[0, 0, 0, :size] = ties.repeat(size // 16)
    of_type = parse_call(name, "storages", library.words(), Scope())
    assert isinstance(of_type, Numbers)
    whole = float(x.abs().max() / (torch.tensor(6.0) * 448))
    found = held_tensor(x, Held(of_type))
    for row, back in zip(x.flatten(0, 2).tolist(), found.flatten(0, 2).tolist(), strict=True):
        blocks = [row[at : at + size] for at in range(0, len(row), size)]
        assert back == [y for block in blocks for y in formula(block, whole)]
