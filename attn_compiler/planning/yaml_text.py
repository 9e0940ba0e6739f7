"""Reads YAML 1.2 core, keeping for every value where it stands: `4:8` is a text, a duplicate key is an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import yaml

from attn_compiler.errors import PolicyError

Scalar = None | bool | int | float | str


@dataclass(frozen=True)
class Place:
    """Where something stands in a file."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Entry:
    """A value and its place. Lists hold entries; mappings hold entries by key, and where their keys stand."""

    value: Scalar | tuple[Entry, ...] | Mapping[str, Entry]
    place: Place
    keys: Mapping[str, Place] = field(default_factory=dict)
    flow: bool = False  # written as {…}

    def plain(self) -> object:
        """The value without places."""
        if isinstance(self.value, Mapping):
            return {key: entry.plain() for key, entry in self.value.items()}
        return [entry.plain() for entry in self.value] if isinstance(self.value, tuple) else self.value

    @property
    def kind(self) -> str:
        """What this is, as an error message calls it."""
        if isinstance(self.value, Mapping):
            return "a mapping"
        if isinstance(self.value, tuple):
            return "a list"
        return "nothing" if self.value is None else repr(self.value)


def entry_of(value: object, file: str = "policy") -> Entry:
    """A Python value (a mapping given to `load_policy`, slots given to `attend`) as an entry."""
    place = Place(file, 1, 1)
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) for key in value):
            raise PolicyError(f"{file}: keys are texts, not {[key for key in value if not isinstance(key, str)]}")
        return Entry({key: entry_of(inner, f"{file}.{key}") for key, inner in value.items()}, place)
    if isinstance(value, list | tuple):
        return Entry(tuple(entry_of(inner, f"{file}[{at}]") for at, inner in enumerate(value)), place)
    if value is None or isinstance(value, bool | int | float | str):
        return Entry(value, place)
    raise PolicyError(f"{file}: expected numbers, texts, lists and mappings, found {type(value).__name__}")


def read_yaml(text: str, file: str) -> Entry:
    """Read one document."""
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        return _document(node, file)
    except RecursionError:
        raise PolicyError(f"{file}: this is nested too deeply, or an alias (`*name`) stands inside of what it names") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(file, mark.line + 1, mark.column + 1) if mark else Place(file, 1, 1)
        raise PolicyError(f"{place}: this is no YAML: {error.problem or error.context}{_hint(text, place)}") from error
    except yaml.YAMLError as error:
        raise PolicyError(f"{file}: this is no YAML: {error}") from error


def _document(node: yaml.Node | None, file: str) -> Entry:
    if node is None:
        raise PolicyError(f"{file}: the file is empty; a policy starts with `version: 1`")
    return _entry(node, file)


def _hint(text: str, place: Place) -> str:
    """What usually is behind a syntax error here."""
    lines = text.splitlines()
    line = lines[place.line - 1] if place.line <= len(lines) else ""
    if re.search(r":\s*[&*|`@%]", line) or re.search(r"[{,]\s*\w+:.*\(", line):
        return "; put the expression into quotes"
    return ""


def _entry(node: yaml.Node, file: str) -> Entry:
    place = Place(file, node.start_mark.line + 1, node.start_mark.column + 1)
    if node.tag not in _PLAIN_TAGS:
        raise PolicyError(f"{place}: tags such as {node.tag} are no part of a policy; leave it out")
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, place)
    if isinstance(node, yaml.SequenceNode):
        return Entry(tuple(_entry(inner, file) for inner in node.value), place)
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return Entry(_scalar(node.value) if plain else node.value, place)


def _mapping(node: yaml.MappingNode, place: Place) -> Entry:
    found: dict[str, Entry] = {}
    keys: dict[str, Place] = {}
    for key_node, value_node in node.value:
        at = Place(place.file, key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        if not isinstance(key_node, yaml.ScalarNode):
            raise PolicyError(f"{at}: a key is a text; an expression with braces or brackets needs quotes")
        key = key_node.value
        if key in found:
            raise PolicyError(f'{at}: the key "{key}" stands here twice; it was first at line {keys[key].line}')
        found[key], keys[key] = _entry(value_node, place.file), at
    return Entry(found, place, keys, flow=bool(node.flow_style))


_PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))
_CORE: tuple[tuple[re.Pattern[str], Callable[[str], Scalar]], ...] = (
    (re.compile(r"|~|null|Null|NULL"), lambda _: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+"), lambda text: int(text, 0)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)"), lambda text: float(text.replace(".", ""))),
)


def _scalar(text: str) -> Scalar:
    return next((make(text) for form, make in _CORE if form.fullmatch(text)), text)
