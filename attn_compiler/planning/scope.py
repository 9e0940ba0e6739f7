"""What the names in a text of the policy language stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.words import PerToken


@dataclass(frozen=True)
class Scope:
    """Names of the text. `strict`: an unknown name is an error, else it is a table given at run time."""

    geometry: Geometry | None = None
    order: PerToken | None = None
    roles: Mapping[str, IntegerSet | str] = field(default_factory=dict)  # a set of positions, or a bool table's name
    labels: Mapping[str, str] = field(default_factory=dict)  # the table's name
    data: frozenset[str] = frozenset()  # names of tables, dotted ones by their first part
    values: Mapping[str, int | float] = field(default_factory=dict)
    layer: int | None = None
    strict: bool = True

    def knows_table(self, name: str) -> bool:
        known = {*self.data, *self.labels.values(), *(r for r in self.roles.values() if isinstance(r, str))}
        return not self.strict or name in known or name.partition(".")[0] in known

    def table_name(self, name: str) -> str:
        """The table behind a label, a role, or its own name."""
        role = self.roles.get(name)
        return role if isinstance(role, str) else self.labels.get(name, name)

    def names(self) -> frozenset[str]:
        return frozenset({*self.data, *self.labels, *self.roles, *self.values})
