"""`attn.export_mlir`: a model with its policy as one file of MLIR, for lengths that are known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from attn_compiler import library
from attn_compiler.errors import ExportError, MissingPackageError, did_you_mean
from attn_compiler.export.comparison import compared
from attn_compiler.export.files import check_folder, place
from attn_compiler.export.metadata import written
from attn_compiler.export.mlir import iree
from attn_compiler.export.mlir.engine import Engine
from attn_compiler.export.mlir.lowering import lowered, results
from attn_compiler.export.mlir.saving import save
from attn_compiler.export.plain import PlainTarget, spelled
from attn_compiler.export.prepared import Inputs
from attn_compiler.export.program import Rewritten, rewritten, traced
from attn_compiler.export.report import Checked, ExportReport
from attn_compiler.export.trials import runs
from attn_compiler.planning.plan import Plan
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.report import report_of

Dialect = Literal["linalg", "torch"]
Given = Sequence[Any] | Mapping[str, Any]  # what a model is called with: arguments, or keywords
MAIN = "main"


def export_mlir(
    model: nn.Module,
    args: Sequence[Any],
    path: str | Path,
    policy: str | Path | Mapping[str, object] | Policy | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    tables: Mapping[str, Tensor] | None = None,
    values: Mapping[str, int] | None = None,
    dialect: Dialect = "linalg",
    buckets: Mapping[str, Given] | None = None,
    vmfb: bool | None = None,
    check: bool = True,
) -> ExportReport:
    """Write a model and what a policy makes of its attentions as MLIR: linalg on tensors, or torch-mlir's own dialect.

    A path that ends in `.mlirbc` is written as bytecode: half as large, and read by the same tools.

    Sizes are those of `args`, and the function is `main`; each of `buckets` is one more function of that name, for inputs (a
    tuple of arguments, or a mapping of keywords) of other sizes. Weights are constants, which all functions share. Before the
    file gets its name, torch-mlir's execution engine runs it beside the rewritten model on random inputs. With `vmfb`, IREE
    compiles it for this machine, to a file beside it that is checked alike; left out, that is done where IREE is installed.
    `check=False` runs neither: torch-mlir's engine takes minutes for large models.
    """
    path = Path(path)
    if dialect not in get_args(Dialect):
        raise ExportError(f'there is no dialect "{dialect}"{did_you_mean(dialect, get_args(Dialect))}')
    check_folder(path)
    _need_packages(vmfb)
    read = library.load_policy(policy if policy is not None else "exact").with_values(dict(values or {}))
    calls = {MAIN: _Call(tuple(args), dict(kwargs or {}))} | {name: _call(given) for name, given in (buckets or {}).items()}
    with torch.no_grad():
        functions = {name: _function(model, call, read, dict(tables or {})) for name, call in calls.items()}
        return _written(functions, read, path, dialect, vmfb=iree.is_there() if vmfb is None else vmfb, check=check)


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class _Function:
    """A rewritten program, and the inputs that its function is tried with."""

    rewritten: Rewritten
    trials: Sequence[Inputs]


def _call(given: Given) -> _Call:
    return _Call((), given) if isinstance(given, Mapping) else _Call(tuple(given), {})


def _function(model: nn.Module, call: _Call, policy: Policy, tables: Mapping[str, Tensor]) -> _Function:
    program = traced(model, call.args, call.kwargs, None)
    result = spelled(rewritten(program, policy, tables, PlainTarget))
    return _Function(result, runs(program, result.module, call.args, call.kwargs))


def _written(
    functions: Mapping[str, _Function], policy: Policy, path: Path, dialect: Dialect, *, vmfb: bool, check: bool
) -> ExportReport:
    plan = sum((one.rewritten.plan for one in functions.values()), Plan())
    report = report_of(plan, policy, len(functions))
    module = lowered({name: one.rewritten.program for name, one in functions.items()}, dialect)
    compiled = path.with_suffix(".vmfb").name

    def write(unfinished: Path) -> None:
        save(module, unfinished, _labels(functions), str(report))
        if vmfb:
            iree.compile_vmfb(unfinished, unfinished.with_name(compiled), dialect)

    def run(unfinished: Path) -> tuple[Checked, ...]:
        ways: list[tuple[str, Engine | iree.Compiled]] = [("torch-mlir", Engine(unfinished, dialect))]
        ways += [("IREE", iree.Compiled(unfinished.with_name(compiled)))] if vmfb else []
        return tuple(_checked(f"{by}, {name}", way, name, one) for name, one in functions.items() for by, way in ways)

    checks, size = place(path, write, run if check else lambda unfinished: (), companion=compiled)
    note = f"compiled by IREE for this machine's processor: {path.with_name(compiled)}" if vmfb else _without(path)
    return ExportReport(path, report, {}, checks, size, notes=(note,))


def _checked(by: str, way: Engine | iree.Compiled, name: str, function: _Function) -> Checked:
    module = function.rewritten.module
    (inputs,) = function.trials  # sizes are fixed: there is one trial

    def run(given: Inputs) -> list[Tensor]:
        found = way.run(name, [x for x in given.values() if isinstance(x, Tensor)])
        return [x.to(known.dtype) for x, known in zip(found, results(module), strict=True)]  # MLIR has no unsigned numbers

    return compared(by, run, inputs, module)


def _without(path: Path) -> str:
    return f"no {path.with_suffix('.vmfb').name}: " + (
        "it was not asked for" if iree.is_there() else f"IREE is not installed ({iree.INSTALL})"
    )


def _labels(functions: Mapping[str, _Function]) -> str:
    """What the attentions of each function are, as `attn explain` reads it back."""
    found = [x for name, one in functions.items() for x in written(one.rewritten, name if len(functions) > 1 else "")]
    return json.dumps(found, ensure_ascii=False)


def _need_packages(vmfb: bool | None) -> None:
    if find_spec("torch_mlir") is None:
        raise MissingPackageError('exporting to MLIR needs the package torch-mlir: pip install "attn-compiler[mlir]"')
    if vmfb and not iree.is_there():
        raise MissingPackageError(f"a .vmfb is made by IREE, which is not installed: {iree.INSTALL}")
