"""`attn.export_pt2`: a model with its policy as one compiled file, which runs where nothing but torch is imported."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from attn_compiler import library
from attn_compiler import torch_private as private
from attn_compiler.errors import ExportError
from attn_compiler.export.comparison import compared
from attn_compiler.export.files import check_folder, place
from attn_compiler.export.metadata import ATTENTIONS, written
from attn_compiler.export.plain import PlainTarget, spelled
from attn_compiler.export.prepared import Inputs
from attn_compiler.export.program import decomposing, rewritten, traced
from attn_compiler.export.report import Checked, ExportReport
from attn_compiler.export.trials import runs
from attn_compiler.graph.names import module_path
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.report import report_of

_OURS = "attn_compiler"
_TORCHS = ("aten", "prims", "prim", "higher_order")


def export_pt2(
    model: nn.Module,
    args: Sequence[Any],
    path: str | Path,
    policy: str | Path | Mapping[str, object] | Policy | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    tables: Mapping[str, Tensor] | None = None,
    values: Mapping[str, int] | None = None,
    dynamic_shapes: Any = None,
    check: bool = True,
) -> ExportReport:
    """Compile a model and what a policy makes of its attentions ahead of time, by AOTInductor, to a file that needs torch alone.

    Every attention becomes operators of PyTorch's own, compiled with the rest of the model for this machine's processor.
    `torch._inductor.aoti_load_package(path)` loads it, and is called as the model is; what the model returns are tensors in plain
    tuples, lists and dictionaries. `dynamic_shapes` is that of torch.export. Before the file gets its name, it runs beside the
    rewritten model on random inputs, of other sizes too where these may change; `check=False` leaves that out.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ExportError(f"torch loads files that end in .pt2; found {path.name}")
    check_folder(path)
    read = library.load_policy(policy if policy is not None else "exact").with_values(dict(values or {}))
    with torch.no_grad():
        with _plain_results(model):
            program = traced(model, args, kwargs or {}, dynamic_shapes)
        result = spelled(rewritten(program, read, dict(tables or {}), PlainTarget, rounds=True))
        notes = tuple(_notes(program))
        trials = runs(program, result.module, args, kwargs or {}) if check else []

        def save(unfinished: Path) -> None:
            with decomposing():
                private.compile_package(program, unfinished, {ATTENTIONS: json.dumps(written(result))})

        checks, size = place(
            path,
            save,
            lambda unfinished: _checks(unfinished, program, result.module, trials),
        )
    return ExportReport(path, report_of(result.plan, read), {}, checks, size, notes=notes)


def _checks(path: Path, program: ExportedProgram, module: fx.GraphModule, trials: Sequence[Inputs]) -> tuple[Checked, ...]:
    call = private.load_package(path)

    def run(inputs: Inputs) -> list[Tensor]:
        args, kwargs = private.tree_unflatten(list(inputs.values()), program.call_spec.in_spec)
        return [x for x in private.tree_leaves(call(*args, **kwargs)) if isinstance(x, Tensor)]

    return tuple(compared("AOTInductor", run, inputs, module) for inputs in trials)


def _notes(program: ExportedProgram) -> Iterator[str]:
    """What the file needs where it runs; raises where that is us."""
    yield "compiled for this machine's processor; torch._inductor.aoti_load_package runs it, with nothing but torch imported"
    for node in _calls(program):
        owner = getattr(node.target, "namespace", "aten")
        if owner == _OURS:
            raise ExportError(
                f"{module_path(node) or 'the model'} calls {node.target}, an operator of ours, so the file would run only where "
                'attn_compiler is imported: leave out the `target` of `attn.attend`, or give `target="torch"`'
            )
        if owner not in _TORCHS:
            yield f"needs the library that defines {node.target} imported where it runs"


def _calls(program: ExportedProgram) -> Iterator[fx.Node]:
    graphs = (one.graph for one in program.graph_module.modules() if isinstance(one, fx.GraphModule))
    return (node for graph in graphs for node in graph.nodes if node.op == "call_function")


@contextmanager
def _plain_results(model: nn.Module) -> Iterator[None]:
    """Let a model return containers that every Python has: a file must not need the classes of a library to be read."""
    hook = model.register_forward_hook(lambda module, inputs, result: _plain(result))
    try:
        yield
    finally:
        hook.remove()


def _plain(result: Any) -> Any:
    if isinstance(result, Mapping):
        return {str(name): _plain(x) for name, x in result.items()}
    if isinstance(result, list | tuple):
        return type(result)(map(_plain, result)) if type(result) in (list, tuple) else tuple(map(_plain, result))
    return result
