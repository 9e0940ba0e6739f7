"""The target of generated C++: which calls its kernels can run, and at which sites they should."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.storage import Held, Storage
from attn_compiler.algebra.variant import Variant, passed_over, without_total
from attn_compiler.planning.findings import visits
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.planner import Carried
from attn_compiler.planning.site import Form, Phase, Site
from attn_compiler.runtime import branches, linear, states
from attn_compiler.runtime.coded_rows import codes_objection, of_rows
from attn_compiler.runtime.codes import encode
from attn_compiler.runtime.compiler import why_not
from attn_compiler.runtime.gather import BY_KERNEL
from attn_compiler.runtime.machine import faster
from attn_compiler.runtime.operator import CODES, attend_generated, dtype_name
from attn_compiler.targets import around
from attn_compiler.targets.blocks import every_query_sees_itself
from attn_compiler.targets.choice import FUSED, FUSED_WHOLE, form_of
from attn_compiler.targets.cpp import coded, gradient
from attn_compiler.targets.cpp.decode import MOST_QUERIES
from attn_compiler.targets.cpp.spec import OfStorage, Stored, in_places, refuse
from attn_compiler.targets.held import lost
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.torch_target import Result, Way, attend_torch

CARRIED = ("storage", "order", *around.CARRIED)
EMPTY = "its kernels begin with an empty state"
DTYPES = ("float32", "bfloat16", "float16")
WORTH = 1.05  # how many times faster than PyTorch's own operator a kernel has to be
FEW = 32  # queries up to which a call is so short that its cost counts
SHORT = 96  # the same where PyTorch has one operator for it
LEAST_TRAINED = 32  # queries from which gradients pay
LIKELY = 1024  # keys that a cache will hold which grows from few


class CppTarget:
    """Kernels in C++, generated for one variant and built by the compiler of the machine."""

    name = "cpp"

    def refuse(self, operands: Operands, variant: Variant, *, lse: bool = False) -> str | None:
        q = operands.q
        if operands.past:
            return EMPTY
        if not lse and (states.can_run(operands, variant) or linear.gathers(operands, variant)):
            return _machine(q.device.type, dtype_name(q.dtype))
        if not lse and branches.serves(operands, variant, self.refuse):
            return None
        stored = {name: Stored(dtype_name(table.dtype), table.ndim) for name, table in operands.tables.items()}
        counted = operands.first_query is not None, not isinstance(operands.k_positions, Tensor)
        reason = _machine(q.device.type, dtype_name(q.dtype)) or objection(variant, counted, stored, operands.differentiated)
        return reason or (without_total(variant) or of_unseeing(operands, variant) if lse else None)

    def attend(self, operands: Operands, variant: Variant, *, lse: bool = False) -> Result:
        if operands.codes and not codes_objection(operands, variant):
            return attend_generated(*of_rows(operands, variant), CODES[self.name], lse=lse)
        if not lse and states.can_run(operands, variant):
            mapped, plain, told = states.prepared(operands, variant)
            out, _ = attend_generated(mapped, plain, "states", told)
            return out.to(operands.q.dtype), None
        if not lse and (linear.gathers(operands, variant) or branches.serves(operands, variant, self.refuse)):
            kernel = branches.kernel(self.refuse, self.attend)
            return attend_torch(operands, variant, way=Way(states=BY_KERNEL, kernel=kernel))
        return around.around(operands, variant, lambda inner, one: attend_generated(inner, one, self.name, lse=lse))

    def carry(self, site: Site, variant: Variant) -> Carried | Refusal:
        if site.recalls:
            return Refusal("cpp", EMPTY)
        missed = lost(site, variant)
        if missed:
            return Refusal("cpp", missed)
        unable = _machine(site.device, site.dtype)
        by_parts = None if unable else branches.carried(site, variant, self.carry) or linear.carried(site, variant)
        if by_parts is not None:
            return by_parts
        unpaid = pays_not(site, variant)
        plain = self.carry(site, with_cache_only(variant)) if unpaid else None
        if isinstance(plain, Carried):
            return replace(plain, instead=with_cache_only(variant), because=unpaid)
        training = site.phase is Phase.TRAIN
        counted = site.kept is None or not site.kept.first  # first tokens in front of the latest stand where a table says
        reason = _machine(site.device, site.dtype) or objection(variant, (counted, counted), {}, training)
        form = form_of(site, variant)
        few = site.q_hint < (SHORT if form in FUSED and not training else FEW)
        if training and site.q_hint < LEAST_TRAINED:
            reason = f"{site.q_hint} queries are too few for its gradients to pay"
        elif not reason and few and _gain(site) < WORTH:
            reason = f"for {site.q_hint} queries and {_keys(site)} keys scaled_dot_product_attention is as fast on this machine"
        dense = not few and with_cache_only(variant) == variant
        if not reason and dense and form in FUSED_WHOLE and _dense_gain(site.dtype, form, training) < WORTH:
            reason = f"{form} is as fast on this machine"
        read = ", which reads the codes of the cache" if site.computes.storage.kv_cache and site.q_hint <= MOST_QUERIES else ""
        return Refusal("cpp", reason) if reason else Carried(f"a generated kernel{read}", gains=True)


def _gain(site: Site) -> float:
    """How many times faster a kernel is than PyTorch's own operator at a site of few queries."""
    held = site.computes.storage.kv_cache
    return _few_gain(site.dtype, *_short(site)) if held is None else _rows_gain(site.dtype, held, *_short(site))


@cache
def _rows_gain(dtype: str, held: Held, queries: int, keys: int) -> float:
    """The same where a cache holds codes, which PyTorch's own operator has to be given as numbers."""
    drawn = torch.randn(3, 1, 8, keys, 64, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    q, codes = drawn[0, :, :, :queries], (encode(drawn[1], held), encode(drawn[2], held))
    operands = Operands(q, drawn[1], drawn[2], {}, 0, 0, tuple(range(8)), 8, 8, 0, 1, codes=codes)
    with torch.no_grad():
        return faster(
            f"{dtype}, {queries} queries and {keys} keys in {held} of torch {torch.__version__}",
            lambda: F.scaled_dot_product_attention(q, codes[0].decode(), codes[1].decode()),
            lambda: CppTarget().attend(operands, Variant()),
        )


def with_cache_only(variant: Variant) -> Variant:
    """The variant whose products are those of operands as they come."""
    groups = tuple((heads, with_cache_only(group)) for heads, group in variant.groups)
    return replace(variant.held(replace(variant.storage, qk=None, pv=None), variant.order), groups=groups)


def pays_not(site: Site, variant: Variant) -> str:
    """Why products of codes would not pay at a site; nothing where they do, or where nobody asks for them."""
    held = [part.storage for part in variant.parts() if with_cache_only(part) != part]
    trained = site.phase is Phase.TRAIN  # to bear what is rounded, whatever that costs
    if not held or trained or _machine(site.device, site.dtype) or objection(variant, (True, True), {}):
        return ""
    if site.q_hint < FEW:
        return f"for {site.q_hint} queries it costs more to encode the keys than products of codes save"
    seen = visits(site, variant).density * site.k_hint
    keys = 4 ** max(2, min(5, round(math.log(max(seen, 1), 4))))
    gain = min(_coded_gain(site.dtype, storage, keys) for storage in held)
    return "" if gain >= WORTH else f"where a query sees about {seen:.0f} keys, products of codes are no faster on this machine"


@cache
def _coded_gain(dtype: str, storage: Storage, keys: int) -> float:
    """How many times faster a kernel of codes is than the plain one, where a query sees so many keys."""
    drawn = torch.randn(3, 1, 2, 1024, 64, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    operands = Operands(drawn[0], drawn[1], drawn[2], {}, 0, 0, (0, 1), 2, 2, 0, 1)
    plain = Variant(mask=(e.k <= e.q) & (e.q - e.k < keys))
    said = ", ".join(f"{operand} in {how}" for operand, how in storage.held())
    with torch.no_grad():
        return faster(
            f"{dtype}, {said}, windows of {keys}",
            lambda: attend_generated(operands, plain, "cpp"),
            lambda: attend_generated(operands, replace(plain, storage=storage), "cpp"),
        )


def _keys(site: Site) -> int:
    """How many keys there will be: while decoding, a cache grows."""
    return max(site.k_hint, LIKELY) if isinstance(site.k_len, str) and site.phase is Phase.DECODE else site.k_hint


def _short(site: Site) -> tuple[int, int]:
    """The queries and keys of a call that was measured, with heads like `_few_gain`'s and not more to do."""
    queries = 1 if site.q_hint <= MOST_QUERIES else MOST_QUERIES + 1 if site.q_hint < FEW else 2 * FEW
    keys = _keys(site) * site.heads * site.head_dim // (8 * 64)
    return queries, 4 ** max(2, min(6, (keys.bit_length() - 1) // 2))


@cache
def _few_gain(dtype: str, queries: int, keys: int) -> float:
    """How many times faster a kernel is than PyTorch's own operator for few queries, what calling it costs included."""
    drawn = torch.randn(3, 1, 8, keys, 64, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    q, (k, v) = drawn[0, :, :, :queries], drawn[1:]
    operands = Operands(q, k, v, {}, 0, 0, tuple(range(8)), 8, 8, 0, 1)
    with torch.no_grad():
        return faster(
            f"{dtype}, {queries} queries and {keys} keys of torch {torch.__version__}",
            lambda: F.scaled_dot_product_attention(q, k, v),
            lambda: attend_generated(operands, Variant(), "cpp"),
        )


@cache
def _dense_gain(dtype: str, form: Form, training: bool) -> float:
    """How many times faster a kernel is than PyTorch's own operator where nothing, or only the future, is hidden."""
    causal = FUSED_WHOLE[form]
    drawn = torch.randn(3, 1, 2, 512, 64, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    q, k, v = (x.requires_grad_(training) for x in drawn)
    operands = Operands(q, k, v, {}, 0, 0, (0, 1), 2, 2, 0, 1, differentiated=training)
    variant = Variant(mask=e.k <= e.q) if causal else Variant()

    def step(attend: Callable[[], Tensor]) -> Callable[[], object]:
        return (lambda: torch.autograd.grad(attend(), (q, k, v), q.detach())) if training else attend

    with torch.set_grad_enabled(training):
        return faster(
            f"{dtype} {form}{', training,' if training else ''} of torch {torch.__version__}",
            step(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)),
            step(lambda: attend_generated(operands, variant, "cpp")[0]),
        )


def of_unseeing(operands: Operands, variant: Variant) -> str | None:
    """Whether a log-sum-exp would lack gradients that queries have which see nothing."""
    totals = (part.normalizer.total for part in variant.parts() if not every_query_sees_itself(operands, part))
    reads = operands.differentiated and any(total is not None and total.tables() for total in totals)
    return "its kernels know no gradients of a table in the log-sum-exp of queries that see nothing" if reads else None


def _machine(device: str, dtype: str) -> str | None:
    if device not in ("cpu", "meta") or dtype not in DTYPES:
        return f"its kernels take {', '.join(DTYPES)} on the CPU; found {dtype} on {device}"
    return why_not()


def objection(
    variant: Variant,
    counted: tuple[bool, bool],
    stored: Mapping[str, Stored],
    differentiated: bool = False,
    of_storage: OfStorage = coded.objection,
) -> str | None:
    """What the kernels have against a variant, whatever the machine; `counted` are the positions of queries and keys."""
    return _objection(variant, counted, tuple(stored.items()), differentiated, of_storage)


@lru_cache(maxsize=1024)
def _objection(
    variant: Variant,
    counted: tuple[bool, bool],
    stored: tuple[tuple[str, Stored], ...],
    differentiated: bool,
    of_storage: OfStorage,
) -> str | None:
    q_counted, k_counted = counted
    placed = [in_places(part, q_counted=q_counted, k_counted=k_counted) for part in variant.parts()]
    reasons = (refuse(part, dict(stored), of_storage) or (gradient.refuse(part) if differentiated else None) for part in placed)
    return passed_over(variant, CARRIED) or around.refuse(variant) or next(filter(None, reasons), None)
