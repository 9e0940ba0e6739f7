"""`attn draw`: what a mask visits, as a sketch or a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from attn_compiler.algebra.notation import notation
from attn_compiler.algebra.variant import Variant
from attn_compiler.cli.axes import axes, tokens
from attn_compiler.library import words
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.language import Scope, parse_mask
from attn_compiler.planning.layout import natural_order
from attn_compiler.planning.schedule import Schedule, schedule


def draw(
    mask: Annotated[str, typer.Argument(help='A mask, like "causal & window(1024)".')],
    length: Annotated[int | None, typer.Option(help="How many keys there are; as the geometry says unless given.", min=1)] = None,
    queries: Annotated[int | None, typer.Option(help="How many queries; as many as keys unless given.", min=1)] = None,
    geometry: Annotated[str | None, typer.Option(help='The axes of the tokens, like "56,56".')] = None,
    heads: Annotated[int, typer.Option(help="How many heads.", min=1)] = 1,
    tile: Annotated[int, typer.Option(help="Tokens along each side of a tile.", min=1)] = 64,
    ordered: Annotated[bool, typer.Option("--ordered", help="Lay the tokens out in the order that suits the mask.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write a picture (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print numbers for programs.")] = False,
) -> None:
    """Draw which tiles a mask visits."""
    size = axes(geometry)
    length = tokens(size, length)
    scope = Scope(geometry=Geometry.of(size) if size else None, strict=False)
    seen = parse_mask(mask, words(), scope)
    variant = Variant(mask=seen.keep, derived=seen.derived)
    order = natural_order(variant, length, size, tile=tile) if ordered else None
    found = schedule(variant, queries or length, length, tile=(tile, tile), heads=heads, order=order)
    if out is not None:
        found.draw(out)
    if as_json:
        typer.echo(json.dumps(_numbers(found)))
    else:
        _print(found, out)


def _numbers(found: Schedule) -> dict[str, object]:
    panels = [
        {
            "heads": panel.heads,
            "density": found.panel_density(panel),
            "full_tiles": panel.runs.count(full=True),
            "mixed_tiles": panel.runs.count(full=False),
        }
        for panel in found.panels
    ]
    return {"mask": notation(found.variant.mask), "tile": found.tile, "density": found.density, "panels": panels}


def _print(found: Schedule, out: Path | None) -> None:
    console = Console()
    console.print(notation(found.variant.mask), style="bold", markup=False, highlight=False)
    for panel in found.panels:
        if found.heads > 1:
            console.print(f"\nheads {', '.join(map(str, panel.heads))}", highlight=False)
        console.print(found.text(min(console.width, 80), panel.heads[0]), markup=False, highlight=False, no_wrap=True)
    console.print(f"density {found.density:.2%} (· empty, ▒ mixed, █ full)", highlight=False)
    if out is not None:
        console.print(f"written to {out}", markup=False, highlight=False, soft_wrap=True)
