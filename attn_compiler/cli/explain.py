"""`attn explain`: what attentions a model has, and what a policy would do to each."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from attn_compiler import torch_private as private
from attn_compiler.cli.model_source import Asked, ModelError, build
from attn_compiler.explain import explain as explained


def explain(
    model: Annotated[
        str, typer.Argument(help="package.module:factory, or hf:type,key=value… (as in hf:llama,num_hidden_layers=2).")
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
    """Explain what a policy makes of a model, without running it: models named hf:… have no weights at all."""
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
