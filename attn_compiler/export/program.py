"""Brings a model into one ATen graph, and rewrites its attentions there as a policy says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from attn_compiler import torch_private as private
from attn_compiler.errors import ExportError
from attn_compiler.graph.analysis import analyze, carry_out
from attn_compiler.graph.weights import fingerprints
from attn_compiler.planning.plan import Decision, NearMiss, Plan
from attn_compiler.planning.planner import plan
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.site import Projections, Site
from attn_compiler.runtime.targets import Target

_AS_THEY_COME = Projections(missing="a file of this kind holds the layers of a model as they come")


@dataclass(frozen=True)
class Rewritten:
    """A program whose attentions a policy has rewritten, how PyTorch runs it, and what was decided for each."""

    program: ExportedProgram
    module: fx.GraphModule
    plan: Plan
    names: tuple[str, ...]  # of the attentions, one for each decision


def rewritten(
    program: ExportedProgram,
    policy: Policy,
    given: Mapping[str, Tensor],
    target: Callable[[str], Target],
    seen: Callable[[Site], Site] = lambda site: site,
    *,
    rounds: bool = False,
) -> Rewritten:
    """Rewrite a program's graph in place, each site by the `target` of its name; rules are asked about it as it is `seen`.

    `rounds`: whether a file of this kind can hold a model's layers otherwise than they come.
    """

    policy = policy.on(lambda: fingerprints(program.named_parameters()))

    def decide(sites: Sequence[Site], near_misses: Sequence[NearMiss]) -> Plan:
        known = sites if rounds else [replace(site, projections=_AS_THEY_COME) for site in sites]
        return plan([seen(site) for site in known], policy, (target(""),), near_misses)

    before = results(program)
    analysis = analyze(program.graph_module, None, decide)
    names = _names(analysis.plan.decisions)
    own = {id(decision): target(name) for decision, name in zip(analysis.plan.decisions, names, strict=True)}
    extra = carry_out(analysis, policy.tables, given, lambda decision: own[id(decision)])
    renamed(program, before)
    hold(program, extra or ())
    return Rewritten(program, module_of(program), analysis.plan, names)


def traced(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    """The model as one graph of ATen operators."""
    if model.training:
        raise ExportError("the model is in training mode; call `model.eval()` before it is exported")
    try:
        with torch.no_grad():
            return torch.export.export(model, tuple(args), dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False)
    except private.RETRACE_FAILURES as failure:
        raise ExportError(f"torch.export cannot trace the model: {type(failure).__name__}: {failure}") from failure


@contextmanager
def decomposing() -> Iterator[None]:
    """Keep torch from warning of a class of its own that it copies whenever it decomposes a program."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        yield


def module_of(program: ExportedProgram) -> fx.GraphModule:
    """How PyTorch runs a program."""
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    return module


def results(program: ExportedProgram) -> list[str]:
    """The names of what a program gives."""
    (output,) = program.graph.find_nodes(op="output")
    return [node.name for node in output.args[0] if isinstance(node, fx.Node)]


def renamed(program: ExportedProgram, before: Sequence[str]) -> None:
    """Let the signature of a program name its results as its graph does, where they were called as in `before`."""
    for old, new in zip(before, results(program), strict=True):
        program.graph_signature.replace_all_uses(old, new)


def hold(program: ExportedProgram, tables: Sequence[Tensor]) -> None:
    """Make inputs that were added behind all others constants of the program, in front of what its caller gives."""
    signature = program.graph_signature
    placeholders = program.graph.find_nodes(op="placeholder")
    own, added = placeholders[: len(signature.input_specs)], placeholders[len(signature.input_specs) :]
    first = next((at for at, spec in enumerate(signature.input_specs) if spec.kind is InputKind.USER_INPUT), len(own))
    for at, (node, table) in enumerate(zip(added, tables, strict=True)):
        spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name=node.name), node.name, None)
        signature.input_specs.insert(first + at, spec)
        program.constants[node.name] = table
        if first < len(own):
            own[first].prepend(node)
    program.graph_module.recompile()


def _names(decisions: Sequence[Decision]) -> tuple[str, ...]:
    """A name of its own for each attention."""
    own = [decision.site.name or "attention" for decision in decisions]
    names: dict[str, None] = {}
    for name in own:
        calls = (f"{name}.call{number}" for number in count(2))
        names[next(one for one in chain([name], calls) if one not in names and (one == name or one not in own))] = None
    return tuple(names)
