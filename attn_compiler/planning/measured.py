"""What calibration has measured: how far each attention, and the whole model, is from what it was without a policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from attn_compiler.errors import PolicyError

_VERSION = 1
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


@dataclass(frozen=True)
class Measured:
    """Of the policy with this digest: each site's cost by its name, and that of the model's result."""

    digest: str
    sites: Mapping[str, SiteCost] = field(default_factory=dict)
    logits: Cost | None = None
    divergence: float | None = None  # of the model's result as logits, Kullback and Leibler's, in nats for each row

    def to_json(self) -> str:
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=2)

    def beyond(self, site: str, tolerance: Mapping[str, float]) -> str:
        """Why a site does not keep a tolerance; nothing if it does."""
        found = {"site": self.sites[site].whole if site in self.sites else None, "logits": self.logits}
        for of, most in tolerance.items():
            what = "this attention" if of == "site" else "the model's result"
            cost = found[of]
            if cost is None:
                return f"its `tolerance` speaks of {what}, which was not measured: {_RUN}"
            if not cost.relative <= most:
                return f"the error of {what} is {cost.relative:.3g}, beyond its `tolerance` of {most:g}"
        return ""


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
            name: SiteCost(Cost(**of["whole"]), tuple(Cost(**one) for one in of["heads"]), of["kv_heads"])
            for name, of in held["sites"].items()
        }
        return Measured(digest, sites, Cost(**held["logits"]) if held["logits"] else None, held["divergence"])
    except (KeyError, TypeError, AttributeError) as error:
        raise PolicyError(f"{path} holds no measurements of attn-compiler: {error!r}; {_RUN}") from error
