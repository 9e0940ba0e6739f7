"""`attn export`: a model with its policy as one ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from attn_compiler.cli.model_source import Asked, Built, build
from attn_compiler.export.front import export_onnx


def export(
    model: Annotated[
        str, typer.Argument(help="package.module:factory, or hf:type,key=value… (random weights: to try out a policy).")
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    policy: Annotated[str | None, typer.Option(help="A policy file, or the name of a ready policy.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the input that is traced.", min=1)] = 1024,
    batch: Annotated[int, typer.Option(help="Rows of that input; a single one stays a single one.", min=1)] = 2,
    static: Annotated[bool, typer.Option("--static", help="Keep the sizes of that input for good.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Let caches be inputs and outputs, to generate text.")] = False,
    strategy: Annotated[str, typer.Option(help="The form of the functions: auto, dense, scan, either or listed.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report for programs.")] = False,
) -> None:
    """Write a model and what a policy makes of its attentions as ONNX, checked in onnxruntime."""
    built = build(model, Asked(length, batch, weights=True))
    shapes = None if static or decode else _dynamic(built)
    written = export_onnx(
        built.model, built.args, out, policy, kwargs=built.kwargs, dynamic_shapes=shapes, strategy=strategy, decode=decode
    )
    typer.echo(json.dumps(written.record(), indent=2, ensure_ascii=False) if as_json else str(written))


def _dynamic(built: Built) -> tuple[Any, ...] | dict[str, Any]:
    """Every size may change that the model does not fix by itself."""

    def of(x: object) -> Any:
        return dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) if isinstance(x, Tensor) else None

    if built.kwargs:
        return {name: of(x) for name, x in built.kwargs.items()}
    return tuple(map(of, built.args))
