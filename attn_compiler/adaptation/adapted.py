"""`attn.adapt`: a model whose attentions run a policy's variants, with the parameters of these as its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attn_compiler import library
from attn_compiler.backend import attn_eagerly
from attn_compiler.errors import PolicyError, RefusedError
from attn_compiler.explain import explain
from attn_compiler.graph.tables import Tables
from attn_compiler.planning.parameter_file import steps_of, write_parameters
from attn_compiler.planning.parameters import Parameter, all_parameters, lacking
from attn_compiler.planning.plan import Decision
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.report import Report
from attn_compiler.planning.sources import Array, Source

PolicyLike = str | Path | Mapping[str, object] | Policy


class Adapted(nn.Module):
    """A model under a policy. `learned` are the parameters that the policy adds, by the names it gives them.

    Called, it runs PyTorch's operators one by one; `torch.compile(adapted.model, backend="attn", options=adapted.options)`
    is the same, compiled. Both read the parameters where they are: what an optimizer writes counts at the next call.
    """

    def __init__(self, model: nn.Module, policy: Policy, values: Mapping[str, Array], report: Report, steps: int) -> None:
        super().__init__()
        self.model, self.policy, self.report, self.steps = model, policy, report, steps
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.learned = nn.ParameterDict({n: nn.Parameter(torch.tensor(x, device=device)) for n, x in sorted(values.items())})
        self.options: dict[str, Any] = {}
        self._running: Callable[..., Any] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._running is None:
            self.__dict__["_running"] = torch.compile(self.model, backend=attn_eagerly, options=self.options)
        assert self._running is not None
        return self._running(*args, **kwargs)

    def run(self, model: nn.Module) -> None:
        """Adapt another model of the same attentions from now on."""
        self.model, self.__dict__["_running"] = model, None

    def save(self, path: str | Path | None = None) -> Path:
        """Write the parameters, by default to the file that the policy calls `parameters:`."""
        if path is None and not self.policy.parameters:
            raise PolicyError(f"policy {self.policy.name} names no file: add `parameters: trained.safetensors`, or give a path")
        path = self.policy.folder / self.policy.parameters if path is None else Path(path)
        write_parameters(path, {name: value.detach().float().cpu().numpy() for name, value in self.learned.items()}, self.steps)
        return path

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": None}  # a copy compiles for its own parameters


def adapt(
    model: nn.Module,
    policy: PolicyLike,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tables: Mapping[str, Tensor] | None = None,
    values: Mapping[str, int] | None = None,
) -> Adapted:
    """Give `model` the parameters that the policy's variants need: those of the policy's file, or new ones where there is none.

    The model is looked at once with these arguments, to learn its layers and heads. New parameters start so that little
    changes: maps of features as the identity, what is added as 0, factors as 1.
    """
    read = library.load_policy(policy)
    report = explain(model, args, kwargs, _allowed(read), tables=tables, values=values, training=False)
    wanted = all_parameters(((d.variant, d.site) for d in _decided(report)), _names(report, read))
    if not wanted:
        refused = (refusal.reason for d in report.plan.decisions if d.refused for refusal in d.refusals)
        reasons = "; ".join(dict.fromkeys(refused))
        raise RefusedError(f"policy {read.name} adds no parameter to any attention of this model{reasons and f': {reasons}'}")
    start = {name: _held(read, one) for name, one in wanted.items()}
    live = replace(read, trained=True, tables={**read.tables, **{name: Source("given", name) for name in wanted}})
    steps = steps_of(read.folder / read.parameters) if read.learned else 0
    adapted = Adapted(model, live, start, report, steps or 0)
    adapted.options = {"policy": live, "tables": Tables(tables, **adapted.learned), "values": dict(values or {})}
    return adapted


def _allowed(policy: Policy) -> Policy:
    """The same policy where untrained parameters are no reason to refuse."""
    return replace(policy, rules=tuple(replace(rule, untrained="allow") for rule in policy.rules))


def _decided(report: Report) -> Iterator[Decision]:
    return (decision for decision in report.plan.decisions if decision.target is not None)


def _names(report: Report, policy: Policy) -> frozenset[str]:
    """The tables that nothing but parameters can be."""
    other = {name: source for name, source in policy.tables.items() if name not in policy.learned}
    return frozenset(name for d in _decided(report) for name in lacking(d.variant, d.site, other))


def _held(policy: Policy, wanted: Parameter) -> Array:
    """What the file of parameters holds, or else what training starts from."""
    source = policy.tables.get(wanted.name)
    return wanted.start() if source is None or source.array is None else source.array.astype(np.float32)
