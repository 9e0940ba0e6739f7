"""`attn explain`: what attentions a model has, and what a policy would do to each."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from attn_compiler import torch_private as private
from attn_compiler.cli.model_source import Asked, ModelError, build
from attn_compiler.explain import explain as explained
from attn_compiler.export.metadata import ENDINGS, labels, record


def explain(
    model: Annotated[
        str,
        typer.Argument(
            help="package.module:factory, hf:type,key=value… (hf:llama,num_hidden_layers=2), or a file: .onnx, .mlir(bc), .pt2."
        ),
    ],
    policy: Annotated[str | None, typer.Option(help="A policy file, or the name of a ready policy.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the input.", min=1)] = 1024,
    batch: Annotated[int, typer.Option(help="Rows of the input.", min=1)] = 1,
    implementation: Annotated[
        Literal["sdpa", "eager"] | None, typer.Option(help="How a transformers model runs its attention.")
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="Look at the model as it trains.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report for programs.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page.")] = None,
) -> None:
    """Explain what a policy makes of a model, without running it: models named hf:… have no weights at all.

    Of a file that `attn export` wrote, MODEL.onnx, .mlir, .mlirbc or .pt2, say which attentions it holds and what became of each.
    """
    if model.endswith(ENDINGS):
        _explain_file(Path(model), as_json=as_json)
        return
    logging.getLogger("torch._subclasses").setLevel(logging.CRITICAL)  # it would print the traceback of what is said below
    built = build(model, Asked(length, batch, implementation, train))
    try:
        report = explained(built.model, built.args, built.kwargs, policy, training=train)
    except private.DYNAMO_CONTROL_FLOW as error:  # its own message says where in the model
        raise ModelError(f"{model} does not run on {built.inputs}: {error}") from error
    if html is not None:
        report.to_html(html)
    typer.echo(report.to_json() if as_json else str(report))
    if html is not None and not as_json:
        typer.echo(f"\nwritten to {html}")


def _explain_file(path: Path, *, as_json: bool) -> None:
    found = labels(path)
    if as_json:
        typer.echo(json.dumps({"path": str(path), "attentions": record(found)}, indent=2, ensure_ascii=False))
        return
    typer.echo(f"{path} · {len(found)} exported attention{'' if len(found) == 1 else 's'}")
    for one in found:
        typer.echo("\n" + "\n".join(one.lines()))
