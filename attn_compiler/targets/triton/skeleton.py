"""Skeletons that are legal Python: their holes are filled, their questions answered, the functions they call put in."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import takewhile

from attn_compiler.library import folder
from attn_compiler.targets.cpp.printer import Dialect

# A comment `# <name>` is a hole, with the rest of its line; what stands before is a stand-in, or what follows up to `# </name>`.
_HOLE = re.compile(r"^([ \t]*)(?:# <([^/>]+)>\n(?:.*\n)*?\1# </\2>|(?:\S.*  )?# <([^/>]+)>)\n", re.MULTILINE)


def written(name: str, holes: Mapping[str, Sequence[str]], facts: Mapping[str, bool]) -> str:
    """A skeleton as a file of its own, where `facts` say which lines below `if FACT:` stay."""
    return _with_tools("\n".join((*_specialized(filled(skeleton(name), holes).splitlines(), facts), "")))


def filled(text: str, holes: Mapping[str, Sequence[str]]) -> str:
    """A skeleton with lines in the place of its holes."""
    return _HOLE.sub(lambda hole: "".join(f"{hole[1]}{line}".rstrip() + "\n" for line in holes[hole[2] or hole[3]]), text)


def joined(first: str, *others: str) -> str:
    """Several files as one: what stands in the first one already is not repeated."""
    parts = first.rstrip().split(_BETWEEN)
    for other in others:
        parts += [part for part in other.rstrip().split(_BETWEEN)[1:] if part not in parts]
    return _BETWEEN.join(parts) + "\n"


_BETWEEN = "\n\n\n"  # functions


def _specialized(lines: Sequence[str], facts: Mapping[str, bool]) -> list[str]:
    """The lines of `if FACT:` and `else:` where they hold, and none of the others."""
    found: list[str] = []
    n = 0
    while n < len(lines):
        asked = re.fullmatch(r"( *)if (\w+):", lines[n])
        if not asked or asked[2] not in facts:
            found.append(lines[n])
            n += 1
            continue
        yes = _block(lines, n + 1, asked[1])
        n += 1 + len(yes)
        no = _block(lines, n + 1, asked[1]) if lines[n : n + 1] == [f"{asked[1]}else:"] else []
        n += len(no) + bool(no)
        found += _specialized([line[4:] for line in (yes if facts[asked[2]] else no)], facts)
    return found


def _block(lines: Sequence[str], start: int, indent: str) -> Sequence[str]:
    """The lines from `start` on that are indented further."""
    inside = takewhile(lambda line: line.startswith(f"{indent} "), lines[start:])
    return list(inside)


def _with_tools(text: str) -> str:
    """With the functions that the kernel calls, in the place of the import."""
    needed, frontier = set[str](), {text}
    while frontier:
        called = {name for body in frontier for name in re.findall(r"(\w+)\(", body)} & tools().keys() - needed
        needed |= called
        frontier = {tools()[name] for name in called}
    head, _, kernels = _IMPORT.sub("", text).partition(_BETWEEN)
    return _BETWEEN.join((head, *(body.rstrip() for name, body in tools().items() if name in needed), kernels))


@lru_cache
def tools() -> Mapping[str, str]:
    """The functions that kernels call, by name."""
    return {match[1]: match[0] for name in _TOOLS for match in _FUNCTION.finditer(skeleton(name))}


_FUNCTION = re.compile(r"^@triton\.jit\ndef (\w+)\(.*\n(?:(?:    .*)?\n)*", re.MULTILINE)
_TOOLS = ("tiles.py", "codes.py", "apart.py")
_IMPORT = re.compile(r"^from (?:tiles|codes|apart) import (?:\([^)]*\)|.*)\n", re.MULTILINE)


@lru_cache
def skeleton(name: str) -> str:
    """A file of `codegen/triton`."""
    return (folder("codegen") / "triton" / name).read_text(encoding="utf-8")


@lru_cache
def dialect() -> Dialect:
    """How Triton spells things."""
    return tomllib.loads(skeleton("dialect.toml"))
