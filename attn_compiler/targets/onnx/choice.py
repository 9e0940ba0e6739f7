"""Which body an exported attention gets: what suits its mask, and what is fastest at its likely lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ExportError, did_you_mean
from attn_compiler.planning.layout import dilation
from attn_compiler.targets.exported import Spec
from attn_compiler.targets.gathered import by_states
from attn_compiler.targets.linear import linear
from attn_compiler.targets.onnx.fit import bounded, is_static, needs_all, refusal
from attn_compiler.targets.onnx.opsets import OPSET
from attn_compiler.targets.operands import head_groups
from attn_compiler.targets.reach import sides
from attn_compiler.targets.walk import STEP, Contents, walks

STRATEGIES: Mapping[str, str] = {
    "dense": "standard operators over all keys",
    "scan": "a loop over blocks of queries, each with the keys in reach",
    "either": "the keys in reach, or all of them where queries are few",
    "batched": "blocks of queries, each with the keys that it may see, as the heads of one ONNX Attention",
    "matmul": "the same as products of matrices, without a loop and without Attention",
    "contrib": "onnxruntime's own GroupQueryAttention or LinearAttention",
    "listed": "a loop over blocks of queries, each with the tiles of keys that a list names",
    "branches": "branches by themselves, each as suits it",
    "states": "a loop over chunks of tokens, each of which meets the state that earlier ones left",
}
ROWS = 128  # queries of a block: fewer cost calls, more cost keys that only some of them see
LISTING = 1.1  # what a key from a list costs beside one among neighbors


@dataclass(frozen=True)
class Likely:
    """The lengths that are expected."""

    queries: int
    keys: int


def check_strategy(wanted: str) -> None:
    """Raise where a strategy is unknown."""
    if wanted not in ("auto", *STRATEGIES):
        raise ExportError(f'there is no strategy "{wanted}"{did_you_mean(wanted, ("auto", *STRATEGIES))}')


def choose(spec: Spec, likely: Likely, contents: Contents, wanted: str = "auto", opset: int = OPSET) -> str:
    """The name of a body; one that is wanted and that an attention has not gives way to `dense`.

    `batched`, `matmul` and `contrib` have to be asked for: they were nowhere measured to be faster (`docs/exporting.md`).
    """
    groups = head_groups(spec.call.variant, spec.heads)
    if any(variant.mix for _, variant in groups):
        return "branches"
    if wanted != "auto":
        return "dense" if refusal(spec, wanted, opset) else wanted
    apart = any(variant.gates is not None for _, variant in groups)  # their terms, one by one, in the place of a product
    costs = {"dense": float(likely.queries * likely.keys * (spec.dim if apart else 1))}
    static = is_static(spec)
    if any(bounded(spec, variant) for _, variant in groups):
        cost = sum(_scan_cost(spec, variant, likely) * len(heads) for heads, variant in groups) / spec.heads
        one = static or _few_among_many(spec, [variant for _, variant in groups])
        costs |= {"scan": cost if static else 0.0} if one else {"either": 0.0}
    if static and not apart and not all(needs_all(spec, variant) for _, variant in groups):
        found = [(walk.cost, part) for heads, variant in groups for part, walk in walks(spec, heads, variant, contents)]
        costs["listed"] = LISTING * sum(cost * len(part) for cost, part in found) / spec.heads
    if any(linear(variant) for _, variant in groups):
        cost = sum(_states_cost(spec, variant, likely) * len(heads) for heads, variant in groups) / spec.heads
        costs["states"] = cost if static else -1.0  # all others' time grows with the square of a length
    return min(costs, key=costs.__getitem__)


def _states_cost(spec: Spec, variant: Variant, likely: Likely) -> float:
    """What gathering by states costs, in pairs of query and key."""
    found, features = linear(variant), variant.feature.width(spec.dim)
    if found is None:
        return float(likely.queries * likely.keys)
    return by_states(found, likely.queries, likely.keys, features, spec.value_dim) / (features + spec.value_dim)


def _few_among_many(spec: Spec, variants: Sequence[Variant]) -> bool:
    """Whether queries may be few and see few keys of many: those of a cache that holds every token."""
    open_ended = any(math.isinf(sides(spec.in_positions(variant.mask)).farthest) for variant in variants)
    return spec.q_len != spec.k_len and spec.call.held is None and not open_ended


def shortest(spec: Spec, variant: Variant) -> int:
    """The number of queries from which on a scan costs less than all keys."""
    lengths = (2**exponent for exponent in range(6, 24))
    return next((n for n in lengths if _scan_cost(spec, variant, Likely(n, n)) < n * n), 2**24)


def _scan_cost(spec: Spec, variant: Variant, likely: Likely) -> float:
    """Pairs of query and key that the blocks of a scan compute."""
    if not bounded(spec, variant):
        return float(likely.queries * likely.keys)
    mask = spec.in_positions(variant.mask)
    reach, step = sides(mask), dilation(mask)
    rows = min(ROWS, likely.queries)
    width = sum(_seen(min(side, likely.keys), likely.keys) for side in (reach.farthest, -reach.nearest))
    keys = min(likely.keys, reach.prefix + width + rows * step) / step
    return math.ceil(likely.queries / rows) * (STEP + rows * keys)


def _seen(side: float, keys: int) -> float:
    """How many keys there are on average within that distance to one side: queries near the end have fewer."""
    return side - side * side / (2 * keys)
