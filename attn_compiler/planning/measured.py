"""What calibration has measured: how far each attention, and the whole model, is from what it was without a policy."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from pathlib import Path

from attn_compiler.errors import PolicyError

_VERSION = 4
_RUN = "run `attn calibrate` again"


@dataclass(frozen=True)
class Cost:
    """How far a result is from the exact one."""

    relative: float  # the norm of the difference over that of the exact result
    cosine: float
    largest: float  # difference


@dataclass(frozen=True)
class SiteCost:
    """What holding the operands of one attention costs: in all, and for each head."""

    whole: Cost
    heads: tuple[Cost, ...]
    kv_heads: int
    operands: tuple[float, ...] = ()  # the largest magnitudes of q, k and v


@dataclass(frozen=True)
class Measured:
    """Of the policy with this digest, on these `weights`: each site's cost by its name, and that of the model's result."""

    digest: str
    sites: Mapping[str, SiteCost] = field(default_factory=dict)
    logits: Cost | None = None
    divergence: float | None = None  # of the model's result as logits, Kullback and Leibler's, in nats for each row
    weights: Mapping[str, str] = field(default_factory=dict)  # the fingerprints of the model's parameters, by name
    foreign: str = ""  # why that says nothing of the graph at hand

    def to_json(self) -> str:
        return json.dumps({"version": _VERSION, **asdict(self), "foreign": ""}, indent=2)

    def on(self, weights: frozenset[tuple[str, str]]) -> Measured:
        """The same, knowing whether the weights at hand are among those that were measured, by name and fingerprint.

        A graph may know names from a module within the model on, or around it; without a fingerprint nothing is computed.
        """
        if self.weights and not weights:
            reason = (
                "which this graph reads none of, so that nobody can tell it from another: compile it whole, without a graph break"
            )
            return replace(self, foreign=f"its `tolerance` was measured on weights, {reason}")
        names: dict[str, list[str]] = defaultdict(list)
        for name, fingerprint in self.weights.items():
            names[fingerprint].append(name)
        known = all(not of or any(map(_alike, names[of], repeat(name))) for name, of in weights)
        return replace(self, foreign="" if known else f"its `tolerance` was measured on other weights: {_RUN}")

    def beyond(self, site: str, tolerance: Mapping[str, float]) -> str:
        """Why a site does not keep a tolerance; nothing if it does."""
        if self.foreign:
            return self.foreign
        found = {"site": self.sites[site].whole if site in self.sites else None, "logits": self.logits}
        for of, most in tolerance.items():
            what = "this attention" if of == "site" else "the model's result"
            cost = found[of]
            if cost is None:
                return f"its `tolerance` speaks of {what}, which was not measured: {_RUN}"
            if not cost.relative <= most:
                return f"the error of {what} is {cost.relative:.3g}, beyond its `tolerance` of {most:g}"
        return ""


def _alike(a: str, other: str) -> bool:
    """Whether two names end alike, one of them in all of it."""
    return f".{a}".endswith(f".{other}") or f".{other}".endswith(f".{a}") or not other


def beside(policy: Path) -> Path:
    """The file in which the costs of a policy file stand."""
    return policy.with_name(f"{policy.stem}.measured.json")


def read_measured(path: Path, digest: str) -> Measured | None:
    """What stands in a file; None where there is none, or where it is of another policy."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path} cannot be read: {error}; {_RUN}") from error
    try:
        if held["version"] != _VERSION or held["digest"] != digest:
            return None
        sites = {
            name: SiteCost(Cost(**of["whole"]), tuple(Cost(**one) for one in of["heads"]), of["kv_heads"], tuple(of["operands"]))
            for name, of in held["sites"].items()
        }
        logits = Cost(**held["logits"]) if held["logits"] else None
        return Measured(digest, sites, logits, held["divergence"], dict(held["weights"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PolicyError(f"{path} holds no measurements of attn-compiler: {error!r}; {_RUN}") from error
