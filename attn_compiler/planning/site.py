"""One attention of a model: where it stands and what it computes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

from attn_compiler.algebra.expr import Expr, Sort, i
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.kept import Kept


class Kind(Enum):
    SELF = "self"
    CROSS = "cross"
    JOINT = "joint"  # several streams of tokens, concatenated, attend to each other
    POOL = "pool"  # learned queries


class Phase(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    TRAIN = "train"


Length = int | str  # a number, or the symbol of a dynamic length
UNKNOWN_LENGTH = 8192  # what a length is taken for that a trace knows nothing of

# How an attention is run with plain torch operators, from the slowest to the fastest.
Form = Literal[
    "written out",
    "scaled_dot_product_attention with a mask",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention(is_causal)",
    "blocks of queries, each with the keys in reach",
    "states, to which keys are added up chunk by chunk",
]


@dataclass(frozen=True)
class Frame:
    """Where queries stand among the keys: the position of query `i`, and how that was found.

    A key's position is its place along the key axis. `first_key` is the first visible place of a row that is padded on
    the left: words that speak of absolute positions count from there. Where a cache `slides`, it has let go of its oldest
    keys: places still tell distances, and nothing else.
    """

    position: Expr = i
    because: str = "given"
    first_key: Expr | None = None
    slides: bool = False


@dataclass(frozen=True)
class TableShape:
    """What is known of a run-time table."""

    shape: tuple[Length, ...]
    sort: Sort
    title: str = ""  # what the model calls it


@dataclass(frozen=True)
class Projections:
    """The products with weights in front of an attention and behind it, or why these are not known."""

    names: tuple[str, ...] = ()
    numbers: frozenset[tuple[int, int]] = frozenset()  # of graphs and products there, which attentions may share
    missing: str = ""


@dataclass(frozen=True)
class Site:
    """One attention in a graph. `computes` says all it does as a variant over (b, h, q, k); its tables are `tables`."""

    name: str
    kind: Kind
    phase: Phase
    layer: int | None
    layers: int | None
    batch: Length
    heads: int
    kv_heads: int
    q_len: Length
    k_len: Length
    head_dim: int
    value_dim: int
    dtype: str
    computes: Variant
    frame: Frame | None  # None: nobody knows where the queries stand, so rules that speak of distances are refused
    q_hint: int  # a likely length, where it is dynamic
    k_hint: int
    device: str = "cpu"
    risky: frozenset[str] = frozenset()  # tables that may hold numbers in which a score vanishes, where gradients are wanted
    input_width: int = 0  # how many numbers of each token q, k and v are projected from; 0 where nobody knows which these are
    normed: bool = False  # whether what these numbers are a norm of is known, too
    rotated: bool = False  # whether q and k are known as they are before a rotary embedding
    recalls: int = 0  # how many states of linear attentions stand for keys that are gone
    summed: str = ""  # what these states are sums of, as `targets/held_past.py` says it
    traits: tuple[str, ...] = ()  # what its cache tells of tokens besides keys and values
    kept: Kept | None = None  # what its cache holds, which let go of the rest
    form: Form = "written out"  # how the model itself runs it
    blocked: str = ""  # why its code cannot be replaced, whatever is asked for
    notes: tuple[str, ...] = ()  # where computing `computes` would differ from the model
    literal: Variant | None = None  # where there are notes: what differs nowhere, with all that hides keys left in the scores
    tables: Mapping[str, TableShape] = field(default_factory=dict, hash=False)
    projections: Projections = Projections(missing="they are layers of a model, of which this call knows nothing")
    idiom: str = ""
    where: str = ""  # file and line of the model's source
    # Questions about dynamic lengths: asking makes the answer a guard.
    longer: Callable[[int], bool] | None = field(default=None, compare=False, repr=False)
    decodes: Callable[[], bool] | None = field(default=None, compare=False, repr=False)
    alike: Callable[[], bool] | None = field(default=None, compare=False, repr=False)  # as many queries as keys

    def at_least(self, tokens: int) -> bool:
        """Whether there are that many keys; where their number is dynamic, that becomes a condition of the compilation."""
        return self.longer(tokens) if self.longer else self.k_hint >= tokens

    def is_in(self, phases: Collection[Phase]) -> bool:
        """Whether its phase is one of these; where lengths are dynamic and decide it, that becomes a condition too."""
        lengths_decide = (Phase.PREFILL in phases) != (Phase.DECODE in phases)
        if self.phase is Phase.TRAIN or self.decodes is None or not lengths_decide:
            return self.phase in phases
        return (Phase.DECODE if self.decodes() else Phase.PREFILL) in phases

    def is_of(self, kinds: Collection[Kind]) -> bool:
        """Whether its kind is one of these; where nothing but dynamic lengths can tell, that becomes a condition too."""
        if self.alike is None or (Kind.SELF in kinds) == (Kind.CROSS in kinds):
            return self.kind in kinds
        return (Kind.SELF if self.alike() else Kind.CROSS) in kinds

    def likely(self) -> Site:
        """The same site at its likely lengths: asking about them adds no condition."""
        return replace(self, longer=None, decodes=None, alike=None)
