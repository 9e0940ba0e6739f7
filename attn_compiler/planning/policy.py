"""A policy: rules that say which attention of a model becomes what."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.errors import LanguageError
from attn_compiler.planning.measured import Measured
from attn_compiler.planning.site import Kind, Phase, Site
from attn_compiler.planning.slots import Naming, Slots, read_slots
from attn_compiler.planning.sources import Source
from attn_compiler.planning.yaml_text import Entry

Fallback = Literal["exact", "error"]


@dataclass(frozen=True)
class Match:
    """What a site must be for a rule to hold; what is empty does not matter."""

    module: str | None = None
    kind: tuple[Kind, ...] = ()
    layers: IntegerSet | None = None
    phase: tuple[Phase, ...] = ()
    min_tokens: int | None = None
    max_tokens: int | None = None

    def excludes(self, site: Site) -> bool:
        """Whether something other than the layer rules a site out."""
        return bool(
            (self.module is not None and not _glob(self.module).fullmatch(f".{site.name}" if site.name else ""))
            or (self.kind and not site.is_of(self.kind))
            or (self.phase and not site.is_in(self.phase))
            or (self.min_tokens is not None and not site.at_least(self.min_tokens))
            or (self.max_tokens is not None and site.at_least(self.max_tokens + 1))
        )

    def __str__(self) -> str:
        """Its conditions, in words."""
        parts = [
            f"named {self.module}" if self.module else "",
            " or ".join(kind.value for kind in self.kind),
            f"in layers {self.layers}" if self.layers else "",
            " or ".join(phase.value for phase in self.phase),
            f"at least {self.min_tokens} tokens long" if self.min_tokens is not None else "",
            f"at most {self.max_tokens} tokens long" if self.max_tokens is not None else "",
        ]
        return ", ".join(filter(None, parts)) or "every attention"

    def in_layer(self, site: Site) -> bool | None:
        """Whether the site's layer is one of the rule's; None where the site's layer is unknown."""
        if self.layers is None:
            return True
        if site.layer is None or site.layers is None:
            return None
        try:
            return site.layer in self.layers.members(site.layers)
        except LanguageError:  # a layer that this model does not have
            return site.layer in _existing(self.layers, site.layers)


def _existing(layers: IntegerSet, count: int) -> frozenset[int]:
    parts = (part for part in layers.parts if isinstance(part, slice) or -count <= part < count)
    return IntegerSet(tuple(parts)).members(count)


@lru_cache(maxsize=256)
def _glob(pattern: str) -> re.Pattern[str]:
    """`*` is one part of a dotted name, `**` any number of parts, none included, `?` one character."""
    # Each part brings the dot before it, so that `**` may stand for nothing at all.
    parts = (r"(?:\.[^.]+)*" if part == "**" else r"\." + _part(part) for part in pattern.split("."))
    return re.compile("".join(parts))


def _part(pattern: str) -> str:
    wild = {"*": r"[^.]*", "?": r"[^.]"}
    return "".join(wild.get(piece, re.escape(piece)) for piece in re.split(r"(\*|\?)", pattern))


@dataclass(frozen=True)
class Rule:
    """The first rule that matches a site decides; an `also` rule adds to what an earlier one decided."""

    number: int
    match: Match
    attn: Entry
    name: str = ""
    because: str = ""
    also: bool = False
    replace_mask: bool = False
    fallback: Fallback = "exact"
    tolerance: Mapping[str, float] = field(default_factory=dict, hash=False)
    untrained: Literal["refuse", "allow"] = "refuse"

    @property
    def title(self) -> str:
        return f'rule {self.number} "{self.name}"' if self.name else f"rule {self.number}"


@dataclass(frozen=True)
class Policy:
    """Rules, and the tables that their variants read."""

    rules: tuple[Rule, ...]
    naming: Naming
    tables: Mapping[str, Source] = field(default_factory=dict, hash=False)
    name: str = ""
    because: str = ""
    parameters: str = ""
    digest: str = ""
    measured: Measured | None = None  # what calibration found
    folder: Path = Path()  # what the paths of its file are relative to
    learned: frozenset[str] = frozenset()  # the tables that its file of parameters holds
    trained: bool = True  # whether somebody trained these

    def without_measurements(self) -> Policy:
        """The policy as it is written."""
        return replace(self, digest=self.measured.digest, measured=None) if self.measured else self

    def with_measurements(self, measured: Measured) -> Policy:
        """The same policy knowing what it costs, which changes what becomes of its rules."""
        digest = hashlib.sha256(f"{self.digest}{measured.to_json()}".encode()).hexdigest()
        return replace(self, digest=digest, measured=measured)

    def on(self, weights: Callable[[], frozenset[tuple[str, str]]]) -> Policy:
        """The same policy for a model with these weights: what was measured on others says nothing of it."""
        return replace(self, measured=self.measured.on(weights())) if self.measured else self

    def with_values(self, values: Mapping[str, int | float]) -> Policy:
        """The same policy where the names in geometries have values."""
        return replace(self, naming=replace(self.naming, values=values))

    def slots(self, rule: Rule, site: Site) -> Slots | None:
        """What a rule sets at a site; None is `exact`."""
        return read_slots(rule.attn, replace(self.naming, layer=site.layer))
