"""`torch.compile(model, backend="attn")`: every attention found, decided, rewritten; Inductor compiles the result."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from attn_compiler import library
from attn_compiler import torch_private as private
from attn_compiler.errors import LanguageError, PolicyError, RefusedError, TableError, did_you_mean
from attn_compiler.graph.analysis import analyze, carry_out
from attn_compiler.graph.bodies import has_anchor
from attn_compiler.graph.tables import Tables
from attn_compiler.graph.weights import fingerprints, weights_of
from attn_compiler.planning.plan import NearMiss, Plan
from attn_compiler.planning.planner import plan
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.report import Report, report_of
from attn_compiler.planning.site import Site
from attn_compiler.planning.uses import Uses
from attn_compiler.runtime.targets import TARGETS
from attn_compiler.targets.holdings import with_caches

log = logging.getLogger("attn_compiler")
OURS = ("policy", "tables", "values", "target")
ENVIRONMENT = "ATTN_POLICY"
_FOR_THE_USER = (PolicyError, LanguageError, TableError, RefusedError)  # what only the user can mend
_RECENT: deque[Report] = deque(maxlen=64)
_USES: dict[str, Uses] = {}  # by a policy's digest, over all graphs that were compiled with it


def reports() -> tuple[Report, ...]:
    """What was decided in the latest graphs that this process compiled, oldest first.

    A model may be compiled as several graphs. Which rules of a policy are idle is judged over all of its graphs, and said in
    the report of the last one.
    """
    last = {report.digest: report for report in _RECENT}
    return tuple(_with_uses(report, report is last[report.digest]) for report in _RECENT)


def _with_uses(report: Report, last: bool) -> Report:
    return replace(report, plan=replace(report.plan, uses=_USES[report.digest] if last else Uses()))


@dataclass(frozen=True)
class Settings:
    """What `options` and `mode` of torch.compile ask for."""

    policy: Policy
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, int] = field(default_factory=dict)
    inductor: Mapping[str, Any] = field(default_factory=dict)
    target: str = "auto"

    def __post_init__(self) -> None:
        if self.target not in ("auto", *TARGETS):
            raise PolicyError(f'options: there is no target "{self.target}"{did_you_mean(self.target, ("auto", *TARGETS))}')

    def planner(self, sites: Sequence[Site], near_misses: Sequence[NearMiss]) -> Plan:
        """Decide sites; all targets are asked in their order, unless one was named."""
        targets = tuple(TARGETS.values()) if self.target == "auto" else (TARGETS[self.target],)
        return with_caches(plan(sites, self.policy.with_values(self.values), targets, near_misses))


def attn(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend. Whatever of ours fails, the model compiles as Inductor alone would compile it, and the report says so."""
    settings = read_settings(options or {}, mode)
    compile_fx = private.inductor()
    graph, extra = _rewritten(gm, example_inputs, settings)
    # Outside of any `try`: Dynamo restarts its analysis by exceptions that pass through here.
    compiled = compile_fx(graph, [*example_inputs, *extra], config_patches=dict(settings.inductor))
    return (lambda *inputs: compiled(*inputs, *extra)) if extra else compiled


def attn_eagerly(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The same without Inductor: what is rewritten runs operator by operator, with whatever gradients are asked for."""
    graph, extra = _rewritten(gm, example_inputs, read_settings(options or {}, mode))
    return lambda *inputs: graph(*inputs, *extra)


def read_settings(options: Mapping[str, Any], mode: str | None) -> Settings:
    """Sort the options into ours and Inductor's; the policy is read now, when compiling."""
    inductor = private.inductor_options(mode, {key: value for key, value in options.items() if key not in OURS})
    if isinstance(inductor, str):
        raise PolicyError(f'options: unknown key "{inductor}"{_nearest(inductor)}')
    source = options.get("policy") or os.environ.get(ENVIRONMENT) or "exact"
    return Settings(
        library.load_policy(source),
        Tables(options.get("tables")),
        dict(options.get("values") or {}),
        inductor,
        options.get("target") or "auto",
    )


def _nearest(key: str) -> str:
    """The option that was meant; Inductor has too many to list them all."""
    near = did_you_mean(key, (*OURS, *private.inductor_settings()))
    return near if near.startswith("; did") else did_you_mean(key, OURS) + ", and the settings of torch._inductor.config"


def _rewritten(
    gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings
) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The graph to compile, and the tables that it reads besides the model's own inputs."""
    policy = settings.policy
    if not has_anchor(gm):
        return gm, ()
    try:
        settings = replace(settings, policy=policy.on(lambda: fingerprints(weights_of(gm, example_inputs))))
        analysis = analyze(gm, example_inputs, settings.planner)
        extra = carry_out(analysis, policy.tables, settings.tables)
    except (*_FOR_THE_USER, private.DYNAMO_CONTROL_FLOW):
        raise
    except Exception as failure:  # whatever it is, the model of the user must compile, unless the user says otherwise
        if any(rule.fallback == "error" for rule in policy.rules):
            raise
        log.warning("a graph is left as it is: %s: %s", type(failure).__name__, failure, exc_info=failure)
        _remember(Plan(remarks=(f"the graph is left as it is: {type(failure).__name__}: {failure}",)), policy)
        return gm, ()
    if extra is not None:
        analysis.forget_values()
    _remember(analysis.plan, policy)
    log.info("%s", reports()[-1])
    return (gm, ()) if extra is None else (analysis.graph, extra)


def _remember(plan: Plan, policy: Policy) -> None:
    _USES[policy.digest] = _USES.get(policy.digest, Uses()) + plan.uses
    _RECENT.append(report_of(plan, policy))
