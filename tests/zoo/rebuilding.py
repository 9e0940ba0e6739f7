"""Computes every attention of a model from its formula alone, and compares values and gradients with what the model computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from attn_compiler.graph.analysis import analyze, carry_out
from attn_compiler.planning.plan import Decision, NearMiss, Plan
from attn_compiler.planning.site import Site
from attn_compiler.testing.budget import budget, largest, over_budget
from zoo.capture import Example, visit_graphs
from zoo.entry import TOKENS, Inputs

SHORTER = TOKENS - 6
_REAL = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class Rebuilt:
    """What was found in the graphs of one model, and where the rebuilt graphs compute something else."""

    sites: list[Site] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    compared: int = 0  # how many tensors were compared
    counted: bool = False  # whether the model ran once

    @property
    def exact(self) -> int:
        """How many sites the policy `exact` may re-emit, and that compute the same then."""
        return 0 if self.differences else sum(not site.notes or site.literal is not None for site in self.sites)

    @property
    def reason(self) -> str:
        """The first thing that went wrong, for a table."""
        notes = [f"{site.name}: {note}" for site in self.sites for note in site.notes]
        return next(iter([*self.differences, *notes, *(f"{miss.name}: {miss.reason}" for miss in self.near_misses)]), "")


def rebuild(model: nn.Module, inputs: Inputs, *, train: bool = False, dynamic: bool = False) -> Rebuilt:
    """Run `model` with each of its graphs rewritten beside the original; with a second length, if lengths are dynamic.

    Sites are counted when they run: one graph may serve several layers.
    """
    found = Rebuilt()

    def beside(gm: fx.GraphModule, example_inputs: Sequence[Example]) -> Callable[..., Any]:
        analysis = analyze(gm, example_inputs, _as_they_are)
        original = copy.deepcopy(analysis.graph)
        if not found.counted:
            found.near_misses += analysis.plan.near_misses
        carry_out(analysis, {}, {})

        def run(*values: Any) -> Any:
            if not found.counted:
                found.sites += [one.site for one in analysis.described]
            if analysis.described:
                _compare(original, analysis.graph, values, found)
            return gm(*values)

        return run

    def second() -> Iterator[Inputs]:
        found.counted = True
        if dynamic:
            yield shorter(inputs)

    if train:
        _never_drop(model)
    visit_graphs(model, inputs, beside, grad=train, dynamic=dynamic, train=train, again=second())
    return found


def shorter(inputs: Inputs) -> Inputs:
    """The same inputs with fewer tokens; how many features an embedding has does not change, even if they are as many."""

    def cut(x: Tensor) -> Tensor:
        is_mask = x.shape[-2:] == (TOKENS, TOKENS) or not x.is_floating_point()
        for dim in range(x.dim() if is_mask else x.dim() - 1):
            x = x.narrow(dim, 0, SHORTER) if x.shape[dim] == TOKENS else x
        return x

    return {name: cut(x) for name, x in inputs.items()}


def in_precision(dtype: torch.dtype, model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """Model and inputs, held in `dtype`."""
    return model.to(dtype), {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def _as_they_are(sites: Sequence[Site], near_misses: Sequence[NearMiss]) -> Plan:
    decisions = (Decision(site, "every site", site.literal or site.computes, exact=True, target="torch") for site in sites)
    return Plan(tuple(decisions), tuple(near_misses))


def _never_drop(model: nn.Module) -> None:
    """Train, but without the randomness that no two programs share."""
    holders = [*model.modules(), *(m.config for m in model.modules() if hasattr(m, "config"))]
    for holder in holders:
        names = [name for name, x in vars(holder).items() if ("drop" in name or name == "p") and isinstance(x, float)]
        for name in names:
            setattr(holder, name, 0.0)


def _compare(original: fx.GraphModule, rewritten: fx.GraphModule, values: Sequence[Any], found: Rebuilt) -> None:
    """In float64, where nothing rounds, the two may differ by less than the model itself errs; and as they are, by the budget."""
    reference, rebuilt = _results(_Wide(original), values, wide=True), _results(_Wide(rewritten), values, wide=True)
    ours, exact = _results(rewritten, values), list(reference.values())
    found.compared += len(exact)

    def plain() -> list[Tensor]:
        results = _results(original, values)
        return [results[name] for name in reference]

    def less_than_the_model(error: float, x: Tensor, _: torch.dtype) -> float:
        return error + 4 * torch.finfo(torch.float64).eps * largest(x)

    for what, other, allowed in (("float64", rebuilt, less_than_the_model), ("as it is", ours, budget)):
        names = [f"{name}, {what}" for name in reference]
        found.differences += over_budget([other[name] for name in reference], exact, plain, names, allowed)


def _results(run: Callable[..., Any], values: Sequence[Any], *, wide: bool = False) -> dict[str, Tensor]:
    """What a graph computes, and the gradients of its inputs, by name; nothing that it writes is kept."""
    own = [_leaf(x, wide) if isinstance(x, Tensor) else x for x in values]
    leaves = {f"gradient of input {place}": x for place, x in enumerate(own) if isinstance(x, Tensor) and x.requires_grad}
    torch.manual_seed(0)  # some models draw numbers while training
    passed = [x.clone() if isinstance(x, Tensor) and not x.requires_grad else x for x in own]
    tensors = [x for x in pytree.tree_leaves(run(*passed)) if isinstance(x, Tensor) and x.is_floating_point()]
    found = {f"output {place}": x.detach() for place, x in enumerate(tensors)}
    differentiable = [x for x in tensors if x.requires_grad]
    if leaves and differentiable:
        total = torch.stack([_weighed(x) for x in differentiable]).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        found |= {name: x for name, x in zip(leaves, gradients, strict=True) if x is not None}
    return found


def _leaf(x: Tensor, wide: bool) -> Tensor:
    own = x.detach().to(torch.float64) if wide and x.dtype in _REAL else x.detach().clone()
    return own.requires_grad_(x.requires_grad and torch.is_grad_enabled())


def _weighed(x: Tensor) -> Tensor:
    """A sum in which no two entries count the same."""
    return (x.double() * torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)).mean()


class _Wide(fx.Interpreter):
    """Runs a graph in float64 throughout, whatever types it names."""

    def run(self, *args: Any, **_: Any) -> Any:
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return super().run(*args)
        finally:
            torch.set_default_dtype(usual)

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.view.default:  # what fits in memory in one precision need not in another
            target = torch.ops.aten.reshape.default
        return (
            _grouped_mm(*args, **kwargs)
            if target is torch.ops.aten._grouped_mm.default
            else super().call_function(target, args, kwargs)
        )

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        return pytree.tree_map(lambda x: torch.float64 if x in _REAL else x, super().fetch_args_kwargs_from_env(n))


def _grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor, **_: Any) -> Tensor:
    """The products of consecutive groups of rows; the operator itself has no float64."""
    first, parts = 0, []
    for last, weight in zip(ends.tolist(), weights, strict=True):
        parts.append(rows[first:last] @ weight)
        first = last
    return torch.cat(parts)
