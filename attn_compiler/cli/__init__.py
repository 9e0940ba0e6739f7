"""The command line `attn`: one file per command."""

from attn_compiler.cli.commands import app

__all__ = ["app"]
