"""Runs a model as it is, and at each attention that a policy would change compares what it gives with what it would give."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from attn_compiler.backend import Settings
from attn_compiler.errors import RefusedError
from attn_compiler.graph.analysis import analyze
from attn_compiler.graph.rewrite import Replacement, computation
from attn_compiler.graph.supply import Supply
from attn_compiler.runtime.targets import TARGETS

Student = Callable[[], Tensor]  # computes a site's output as the policy says, from the model's own q, k and v
Teach = Callable[[str, Student, Tensor], None]  # the name of a site, its student, and what the site gives by itself
Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Lesson:
    """One attention of a graph: the nodes that the policy's variant reads, and the one that says what is right."""

    name: str
    compute: Callable[..., Tensor]
    reads: tuple[fx.Node, ...]
    right: fx.Node


def teaching(settings: Settings, learned: Collection[str], teach: Teach) -> Backend:
    """A backend of torch.compile that runs every graph unchanged, and calls `teach` at each site with parameters."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        analysis = analyze(gm, example_inputs, settings.planner)
        supply = Supply(analysis.graph, settings.policy.tables, settings.tables)
        lessons: list[Lesson] = []
        for described, home, decision in zip(analysis.described, analysis.homes, analysis.plan.decisions, strict=True):
            if decision.target is None or not decision.variant.tables() & frozenset(learned):
                continue
            if home.outer is not None:
                raise RefusedError(
                    f"{decision.site.name} stands inside of `{home.body}`, where nothing can be taught: turn that off"
                )
            given = supply.nodes(sorted(decision.variant.tables() - set(described.tables)))
            replacement = Replacement(described, decision.variant, TARGETS["torch"], given)
            compute, reads = computation(analysis.graph.graph, replacement)
            lessons.append(Lesson(decision.site.name, compute, tuple(reads), described.found.out.node))
        if not lessons:
            return gm.forward
        analysis.graph.recompile()
        run = _Run(analysis.graph, lessons, teach)
        return lambda *inputs: run.run(*inputs, *supply.extra)

    return backend


class _Run(fx.Interpreter):
    """Runs a graph node by node, and keeps what lessons read."""

    def __init__(self, graph: fx.GraphModule, lessons: Sequence[Lesson], teach: Teach) -> None:
        super().__init__(graph)
        self._teach = teach
        self._lessons: Mapping[fx.Node, Lesson] = {lesson.right: lesson for lesson in lessons}
        self._watched = {node for lesson in lessons for node in lesson.reads}
        self._values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._watched:
            self._values[n] = value
        lesson = self._lessons.get(n)
        if lesson is not None:
            values = [self._values[node] for node in lesson.reads]
            self._teach(lesson.name, lambda: lesson.compute(*values), value)
        return value
