"""`attn variants`: every word of the policy language."""

from __future__ import annotations

import inspect
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from attn_compiler.library import words
from attn_compiler.planning.words import Word


def variants(as_json: Annotated[bool, typer.Option("--json", help="Print a list for programs.")] = False) -> None:
    """List the words that a policy may use, with what they mean."""
    known = [word for folder in words().values() for word in folder.values()]
    if as_json:
        rows = [{"folder": w.folder, "word": w.name, "signature": _signature(w), "summary": w.summary} for w in known]
        typer.echo(json.dumps(rows))
        return
    table = Table("folder", "word", "meaning", box=None, pad_edge=False)
    previous = ""
    for word in known:
        table.add_row(word.folder if word.folder != previous else "", _signature(word), word.summary)
        previous = word.folder
    Console(markup=False).print(table)


def _signature(word: Word) -> str:
    """As it is written in a policy: without what the scope supplies."""
    written = [p.replace(annotation=p.empty) for p in word.parameters if p.kind is not p.KEYWORD_ONLY]
    return f"{word.name}{inspect.Signature(written)}" if written else word.name
