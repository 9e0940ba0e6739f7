"""Tells the weights of one model from those of another of its kind: fingerprints that cost next to nothing to take."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from attn_compiler import torch_private as private
from attn_compiler.graph.names import parameter_path

SAMPLED = 256  # numbers of each weight, evenly spread


def fingerprints(weights: Iterable[tuple[str, Tensor]]) -> frozenset[tuple[str, str]]:
    """Each weight's name and one short text; none for weights on the meta device, which nothing is computed with."""
    return frozenset((name, "" if x.is_meta else _fingerprint(x.detach())) for name, x in weights)


def weights_of(gm: fx.GraphModule, inputs: Sequence[private.Traced]) -> Iterator[tuple[str, Tensor]]:
    """The parameters that a graph reads, as Dynamo hands them over, or holds; with their names, or what is known of these."""
    yield from (("", x) for x in gm.parameters())
    nodes = gm.graph.find_nodes(op="placeholder")
    yield from ((parameter_path(node), x) for node, x in zip(nodes, inputs, strict=False) if isinstance(x, nn.Parameter))


def _fingerprint(weight: Tensor) -> str:
    said = hashlib.sha256(f"{weight.dtype} {[*weight.shape]}".encode())
    if not private.is_fake(weight) and weight.numel():
        places = torch.linspace(0, weight.numel() - 1, min(SAMPLED, weight.numel()), dtype=torch.float64).long()
        sample = weight.flatten()[places.to(weight.device)].cpu()
        said.update(sample.view(torch.uint8).numpy().tobytes())
    return said.hexdigest()[:16]
