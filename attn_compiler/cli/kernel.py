"""`attn kernel`: the source of the kernel that a mask becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.syntax import Syntax

from attn_compiler.cli.axes import axes, tokens
from attn_compiler.runtime.kernel_source import kernel_source
from attn_compiler.whole_file import whole_file

_LEXERS = {"cpp": "cpp", "triton": "python"}


def kernel(
    mask: Annotated[str, typer.Argument(help='A mask, like "causal & window(256)".')],
    length: Annotated[int | None, typer.Option(help="How many keys there are; as the geometry says unless given.", min=1)] = None,
    queries: Annotated[int | None, typer.Option(help="How many queries; as many as keys unless given.", min=1)] = None,
    geometry: Annotated[str | None, typer.Option(help='The axes of the tokens, like "56,56".')] = None,
    score: Annotated[str | None, typer.Option(help='What becomes of the scores, like "softcap(score, 50)".')] = None,
    normalizer: Annotated[str | None, typer.Option(help="How scores become weights; softmax unless given.")] = None,
    feature: Annotated[str | None, typer.Option(help='What q and k are mapped by, like "elu_one".')] = None,
    state: Annotated[str | None, typer.Option(help='What linear attention leaves of its past, like "gate(scalar)".')] = None,
    heads: Annotated[int, typer.Option(help="How many query heads.", min=1)] = 8,
    kv_heads: Annotated[int | None, typer.Option(help="How many key heads; as many as query heads unless given.", min=1)] = None,
    head_dim: Annotated[int, typer.Option(help="How many numbers a head has.", min=1)] = 64,
    dtype: Annotated[str, typer.Option(help="What the operands are: float32, bfloat16 or float16.")] = "float32",
    target: Annotated[str, typer.Option(help="The language of the kernel: cpp or triton.")] = "cpp",
    save: Annotated[Path | None, typer.Option(help="Write it to this file instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it for programs.")] = False,
) -> None:
    """Print the source of the kernel that attends by a mask."""
    size = axes(geometry)
    length = tokens(size, length)
    given = {"mask": mask, "geometry": size or None, "score": score, "normalizer": normalizer, "feature": feature, "state": state}
    text = kernel_source(
        {slot: value for slot, value in given.items() if value is not None},
        q_len=queries or length, k_len=length, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, target=target,
    )  # fmt: skip
    console = Console()
    if save:
        with whole_file(save) as file:
            file.write_text(text, encoding="utf-8")
    elif as_json:
        typer.echo(json.dumps({"target": target, "dtype": dtype, "source": text}))
    elif console.is_terminal:
        console.print(Syntax(text, _LEXERS[target], background_color="default"))
    else:
        typer.echo(text, nl=False)
