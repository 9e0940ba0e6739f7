"""What computes a product with a weight whose factors are held in few bits, in place of a node of a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from attn_compiler.algebra.storage import Held
from attn_compiler.graph.contraction import Label
from attn_compiler.graph.projections import product
from attn_compiler.targets.projected import projected


def rounding(node: fx.Node, how: Held) -> tuple[Callable[..., Tensor], list[fx.Node]]:
    """What computes the product `node` so, and the nodes whose values it is given."""
    read = product(node)
    assert read is not None, f"{node} is no product with a weight"
    of_x, of_weight, out, dtype = read.x.labels, read.weight.labels, read.out, node.meta["val"].dtype
    summed = tuple(label for label in of_x if label not in out)
    rows, columns = (tuple(label for label in out if label in of) for of in (of_x, of_weight))

    def compute(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # which would round to 16 bits again what codes and scales stand for
            found = projected(_flat(x, of_x, rows, summed), _flat(weight, of_weight, columns, summed), how)
        sizes = [x.shape[of_x.index(label)] for label in rows] + [weight.shape[of_weight.index(label)] for label in columns]
        found = found.reshape(sizes).permute([(*rows, *columns).index(label) for label in out])
        return sum(bias, found).to(dtype)

    return compute, [node for node in (read.x.node, read.weight.node, read.bias) if node is not None]


def _flat(x: Tensor, labels: Sequence[Label], rows: Sequence[Label], summed: Sequence[Label]) -> Tensor:
    """[rows, summed]."""
    turned = x.permute([labels.index(label) for label in (*rows, *summed)])
    return turned.reshape(-1, math.prod(turned.shape[len(rows) :]))
