"""`attn export`: a model with its policy as one file that other programs run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor

from attn_compiler.cli.model_source import Asked, Built, build, inputs_of
from attn_compiler.errors import ExportError
from attn_compiler.export.front import export_onnx
from attn_compiler.export.mlir.front import Dialect, export_mlir
from attn_compiler.export.pt2 import export_pt2
from attn_compiler.targets.onnx.choice import STRATEGIES
from attn_compiler.targets.onnx.opsets import OPSET

Format = Literal["onnx", "mlir", "pt2"]
_ENDINGS: dict[str, Format] = {".mlir": "mlir", ".mlirbc": "mlir", ".pt2": "pt2"}


def export(
    model: Annotated[
        str, typer.Argument(help="package.module:factory, or hf:type,key=value… (random weights: to try out a policy).")
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    format_: Annotated[Format | None, typer.Option("--format", help="Of the file; by its ending, unless given.")] = None,
    policy: Annotated[str | None, typer.Option(help="A policy file, or the name of a ready policy.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the input that is traced.", min=1)] = 1024,
    batch: Annotated[int, typer.Option(help="Rows of that input; a single one stays a single one.", min=1)] = 2,
    static: Annotated[bool, typer.Option("--static", help="Keep the sizes of that input for good, as MLIR does.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="ONNX: caches are inputs and outputs, to generate text.")] = False,
    strategy: Annotated[str | None, typer.Option(help=f"ONNX: the form of the functions: auto, {', '.join(STRATEGIES)}.")] = None,
    flavor: Annotated[
        Literal["plain", "genai"] | None, typer.Option(help="ONNX, with --decode: genai has the names of onnxruntime-genai.")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX: 24, or 18 for importers that do not know `Attention`.")] = None,
    dialect: Annotated[Dialect | None, typer.Option(help="MLIR: linalg on tensors, or that of torch-mlir.")] = None,
    lengths: Annotated[str, typer.Option(help="MLIR: further lengths, a function `tokens_<length>` each: 128,512.")] = "",
    vmfb: Annotated[
        bool | None, typer.Option("--vmfb/--no-vmfb", help="MLIR: let IREE compile it; if it is installed, unless given.")
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Run the file beside the rewritten model first.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report for programs.")] = False,
) -> None:
    """Write a model and what a policy makes of its attentions as ONNX, MLIR or a compiled .pt2, checked by running the file."""
    kind = format_ or _ENDINGS.get(out.suffix, "onnx")
    _check_fit(kind, "onnx", {"--decode": decode, "--strategy": strategy, "--flavor": flavor, "--opset": opset})
    _check_fit(kind, "mlir", {"--dialect": dialect, "--lengths": lengths, "--vmfb or --no-vmfb": vmfb is not None})
    asked = Asked(length, batch, weights=True)
    built = build(model, asked)
    given = (built.model, built.args, out, policy)
    shapes = None if static or decode else _dynamic(built)
    if kind == "mlir":
        buckets = {f"tokens_{n}": inputs_of(built.model, replace(asked, length=n)) for n in _numbers(lengths)}
        written = export_mlir(*given, kwargs=built.kwargs, dialect=dialect or "linalg", buckets=buckets, vmfb=vmfb, check=check)
    elif kind == "pt2":
        written = export_pt2(*given, kwargs=built.kwargs, dynamic_shapes=shapes, check=check)
    else:
        written = export_onnx(
            *given, kwargs=built.kwargs, dynamic_shapes=shapes, strategy=strategy or "auto", decode=decode,
            flavor=flavor or "plain", opset=opset or OPSET, check=check,
        )  # fmt: skip
    typer.echo(json.dumps(written.record(), indent=2, ensure_ascii=False) if as_json else str(written))


def _check_fit(kind: Format, other: Format, options: Mapping[str, object]) -> None:
    """Raise where an option is given that files of another format have."""
    unfit = next((name for name, given in options.items() if given), None)
    if unfit and other != kind:
        raise ExportError(f"{unfit} is for files of the format {other}; this one is to be {kind}")


def _numbers(lengths: str) -> list[int]:
    parts = [part.strip() for part in lengths.split(",") if part.strip()]
    wrong = next((part for part in parts if not part.isdecimal() or int(part) == 0), None)
    if wrong is not None:
        raise ExportError(f'--lengths takes numbers of tokens, as in 128,512; found "{wrong}"')
    return [int(part) for part in parts]


def _dynamic(built: Built) -> tuple[Any, ...] | dict[str, Any]:
    """Every size may change that the model does not fix by itself."""

    def of(x: object) -> Any:
        return dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) if isinstance(x, Tensor) else None

    if built.kwargs:
        return {name: of(x) for name, x in built.kwargs.items()}
    return tuple(map(of, built.args))
