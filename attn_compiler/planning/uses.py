"""What became of a policy's rules in the graphs that are known: which decided something, and why the others did not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RuleUse:
    """One rule: how many attentions are such as it says, and how many it decided."""

    title: str
    because: str
    says: str  # its conditions, in words
    named: bool  # it speaks of names
    also: bool
    matched: int
    decided: int

    def __add__(self, other: RuleUse) -> RuleUse:
        return replace(self, matched=self.matched + other.matched, decided=self.decided + other.decided)


@dataclass(frozen=True)
class Uses:
    """All rules of one policy, over one graph or, added up, over several. Only the whole tells which rule is idle."""

    rules: tuple[RuleUse, ...] = ()
    attentions: int = 0
    example: str = ""  # the name of one of them
    parameters: str = ""

    def __add__(self, other: Uses) -> Uses:
        if not (self.rules and other.rules):
            rules = self.rules or other.rules
        else:
            rules = tuple(mine + its for mine, its in zip(self.rules, other.rules, strict=True))
        count, example = self.attentions + other.attentions, self.example or other.example
        return Uses(rules, count, example, self.parameters or other.parameters)

    def because(self, title: str) -> str:
        """Why the rule of that title is there, where whoever wrote it says so."""
        return next((rule.because for rule in self.rules if rule.title == title), "")

    def warnings(self) -> Iterator[str]:
        """What whoever wrote the policy did not expect."""
        if self.rules and not self.attentions:
            yield "no attention was found, so that no rule decided anything"
        elif self.rules:
            yield from (f"{rule.title} {self._idle(rule)}" for rule in self.rules if not rule.decided)
        if self.parameters:
            yield f"{self.parameters} is not read: no variant of this policy has parameters"

    def _idle(self, rule: RuleUse) -> str:
        if rule.matched and rule.also:
            return "adds nothing: no earlier rule decides what it matches"
        if rule.matched:
            return "decides nothing: earlier rules take all that it matches"
        like = f"; they are called like {self.example}" if rule.named and self.example else ""
        return f"matches nothing: no attention is {rule.says}{like}"
