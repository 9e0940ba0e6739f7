"""What onnxruntime's caches hold in the place of numbers: whole numbers of few bits, and a scale for each channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_compiler.algebra.variant import Variant

TYPES = ("int8", "int4")


@dataclass(frozen=True)
class Codes:
    """Codes of so many bits; two of four bits share a byte, the first of them in its lower half, both counted from -8."""

    bits: int

    def __str__(self) -> str:
        return f"int{self.bits}"

    @property
    def largest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.bits == 8 else torch.uint8

    def width(self, dim: int) -> int:
        """How many bytes so many channels take."""
        return dim * self.bits // 8

    def encode(self, x: Tensor, scale: Tensor) -> Tensor:
        """The codes of keys or values; what is beyond the largest becomes the largest."""
        codes = torch.round(x / scale).clamp(-self.largest - 1, self.largest)
        if self.bits == 8:
            return codes.to(torch.int8)
        counted = (codes + 8).to(torch.uint8)
        return counted[..., ::2] | counted[..., 1::2] << 4

    def decode(self, held: Tensor, scale: Tensor) -> Tensor:
        """The numbers that codes stand for."""
        if self.bits == 4:
            held = torch.stack([held & 15, held >> 4], dim=-1).flatten(-2).to(torch.int8) - 8
        return held * scale


def codes_of(variant: Variant) -> Codes:
    """What the cache of a variant holds that asks for one in codes."""
    assert variant.storage.kv_cache is not None
    return Codes(variant.storage.kv_cache.numbers.bits)
