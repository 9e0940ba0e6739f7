"""Gathers the commands of `attn`, and turns errors into one clear message."""

from __future__ import annotations

import typer
from rich.console import Console
from typer.core import TyperGroup

from attn_compiler.cli.adapt import adapt
from attn_compiler.cli.calibrate import calibrate
from attn_compiler.cli.check import check
from attn_compiler.cli.choose import chosen
from attn_compiler.cli.demo import demo
from attn_compiler.cli.draw import draw
from attn_compiler.cli.explain import explain
from attn_compiler.cli.export import export
from attn_compiler.cli.kernel import kernel
from attn_compiler.cli.variants import variants
from attn_compiler.errors import AttnError


class _Commands(TyperGroup):
    """Says what was wrong, without the traceback of somebody else's program."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]  # typer carries its own copy of click
        try:
            return TyperGroup.invoke(self, ctx)
        except (AttnError, OSError) as error:  # a file that cannot be written is said in one line, too
            Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find, explain and rewrite the attentions of a PyTorch model.",
)
app.command()(adapt)
app.command()(calibrate)
app.command()(check)
app.command("choose")(chosen)
app.command()(explain)
app.command()(demo)
app.command()(draw)
app.command()(export)
app.command()(kernel)
app.command()(variants)


@app.callback()
def _main() -> None:
    """Find, explain and rewrite the attentions of a PyTorch model."""
