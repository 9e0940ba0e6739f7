"""A small language model compiled by Inductor, by us, and by us with a policy: what `attn demo` runs."""

from __future__ import annotations

import typer

from attn_compiler.cli.demo import demo


def main() -> None:
    typer.run(demo)


if __name__ == "__main__":
    main()
