"""Where the kernel of linear attention is worth its while: alone for a whole variant, or for the linear parts of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import b, i
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.planner import Carried
from attn_compiler.planning.site import UNKNOWN_LENGTH, Phase, Site
from attn_compiler.runtime.gather import BY_KERNEL
from attn_compiler.runtime.machine import faster
from attn_compiler.runtime.states import WIDEST
from attn_compiler.targets.chunked import BY_CHUNKS
from attn_compiler.targets.cpp.states import serves
from attn_compiler.targets.faded import BY_FEATURE
from attn_compiler.targets.fading import Fading
from attn_compiler.targets.gathered import Gather, offset_of, pays
from attn_compiler.targets.linear import Linear, linear
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.past import continued
from attn_compiler.targets.torch_target import refuse
from attn_compiler.torch_private import likely

WORTH = 1.05  # how many times faster than PyTorch's operators the kernel has to be


class Takes(NamedTuple):
    """Which calls a kernel is for: how many features it takes, whether few tokens, and those behind a state, are worth it, and
    whether each feature may fade by a gate of its own.
    """

    widest: float
    few: bool
    gates: bool


OF_CPP = Takes(WIDEST, few=False, gates=True)


def gathers(operands: Operands, variant: Variant, takes: Takes = OF_CPP) -> bool:
    """Whether some part of a call is linear, and saves work by the kernel's states; the others are PyTorch's operators."""
    return any(_gathers(operands, part, takes) for part in variant.parts() if part.mix is None) and refuse(variant) is None


def _gathers(operands: Operands, variant: Variant, takes: Takes) -> bool:
    found, dim = linear(continued(variant) if operands.past else variant), operands.q.shape[-1]
    features = variant.feature.width(dim)
    if found is None or features > takes.widest or (variant.dropout and operands.training):
        return False
    if variant.gates is not None and not takes.gates:
        return False
    if operands.differentiated and not _differentiable(found):
        return False
    if found.behind is not None and offset_of(operands, found) is None:
        return False
    q_len, k_len = (likely(size, UNKNOWN_LENGTH) for size in (operands.q_len, operands.k_len))
    return takes.few or pays(found, q_len, k_len, features, operands.v.shape[-1])


def carried(site: Site, variant: Variant) -> Carried | None:
    """How the kernel runs at a site where queries follow each other and states save half of the work; None if it should not."""
    gathered, training = by_states(site, variant), site.phase is Phase.TRAIN
    if not gathered:
        return None
    if not training and serves(variant) is not None:
        return Carried("a generated kernel, whose state stays in the cache", gains=True)
    if gain(training=training, fading=_fading(gathered)) < WORTH:
        return None
    return Carried(form(variant, gathered), gains=True)


def by_states(site: Site, variant: Variant, takes: Takes = OF_CPP) -> Sequence[Variant]:
    """The parts of a variant that a kernel gathers by states at a site."""
    found = [part for part in _parts(variant) if _suits(site, part, takes)]
    return found if refuse(variant) is None else ()


def form(variant: Variant, gathered: Sequence[Variant]) -> str:
    """What a plan says where these parts are gathered by states."""
    rest = "" if len(gathered) == len(_parts(variant)) else ", and PyTorch's operators for what is not linear"
    return f"a generated kernel that adds keys up to states{rest}"


def _parts(variant: Variant) -> Sequence[Variant]:
    return [part for part in variant.parts() if part.mix is None and (part is not variant or not part.groups)]


def _suits(site: Site, variant: Variant, takes: Takes) -> bool:
    found = linear(variant)
    features = variant.feature.width(site.head_dim)
    if found is None or features > takes.widest or not (_counted(site) or site.recalls):
        return False
    if variant.gates is not None and not takes.gates:
        return False
    if site.phase is Phase.TRAIN and (variant.dropout or not _differentiable(found)):
        return False
    return takes.few or pays(found, site.q_hint, site.k_hint, features, site.value_dim)


def _counted(site: Site) -> bool:
    """Whether queries follow each other from a position on that is known; behind states they are the last of the keys."""
    first = None if site.frame is None else simplify(site.frame.position - i)
    return first is not None and not first.mentions(i, b) and not first.tables()


def _differentiable(found: Linear) -> bool:
    """Whether no rate of a decay is trained: in the sum over tokens that is its gradient, all but rounding errors cancels."""
    nodes = () if found.fades is None else found.fades.walk()
    return all(node.mentions(e.k) for node in nodes if node.op == "table" and node.sort is e.Sort.REAL)


def _fading(gathered: Sequence[Variant]) -> Fading | None:
    """What of the states of some parts fades by logs of its own."""
    if any(part.gates is not None for part in gathered):
        return Fading.ROWS
    return Fading.TOGETHER if any(part.score != e.score for part in gathered) else None


_SAID = {None: "", Fading.TOGETHER: ", with a decay", Fading.ROWS: ", with a gate for each feature"}


@cache
def gain(*, training: bool, fading: Fading | None) -> float:
    """How many times faster the kernel gathers than PyTorch's operators do, with the gradients where one trains."""
    drawn = torch.randn(3, 1, 2, 1024, 64, generator=torch.Generator().manual_seed(0))
    q, k, v = (x.requires_grad_(training) for x in drawn)
    log = torch.linspace(0, -9, 1024, dtype=torch.float64).expand(1, 2, 1024)
    log = log[..., None].expand(1, 2, 1024, 64).contiguous() if fading is Fading.ROWS else log
    logs = None if fading is None else (log, log)

    def step(gather: Gather) -> Callable[[], object]:
        def run() -> tuple[Tensor, ...]:
            acc, mass = gather.run(q, k, v, logs, 0)
            return torch.autograd.grad(acc.sum() + mass.sum(), (q, k, v)) if training else (acc, mass)

        return run

    said = f"gathering{_SAID[fading]}{', training' if training else ''} of torch {torch.__version__}"
    with torch.set_grad_enabled(training):
        return faster(said, step(BY_FEATURE if fading is Fading.ROWS else BY_CHUNKS), step(BY_KERNEL))
