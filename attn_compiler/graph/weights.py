"""Tells the weights of one model from those of another of its kind: fingerprints that cost next to nothing to take."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from attn_compiler import torch_private as private

SAMPLED = 256  # numbers of each weight, evenly spread


def fingerprints(weights: Iterable[Tensor]) -> frozenset[str]:
    """One short text for each weight; weights on the meta device are none."""
    return frozenset(_fingerprint(x.detach()) for x in weights if not x.is_meta)


def weights_of(gm: fx.GraphModule, inputs: Sequence[private.Traced]) -> Iterator[Tensor]:
    """The parameters that a graph reads, as Dynamo hands them over, or holds."""
    yield from gm.parameters()
    yield from (x for x in inputs if isinstance(x, nn.Parameter))


def _fingerprint(weight: Tensor) -> str:
    said = hashlib.sha256(f"{weight.dtype} {[*weight.shape]}".encode())
    if not private.is_fake(weight) and weight.numel():
        places = torch.linspace(0, weight.numel() - 1, min(SAMPLED, weight.numel()), dtype=torch.float64).long()
        sample = weight.flatten()[places.to(weight.device)].cpu()
        said.update(sample.view(torch.uint8).numpy().tobytes())
    return said.hexdigest()[:16]
