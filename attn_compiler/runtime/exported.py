"""The operators that stand for attentions in a graph to be exported, and the target that puts them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_compiler.algebra.expr import const, score, table
from attn_compiler.algebra.variant import SOFTMAX, How, Variant, passed_over
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.planner import Carried
from attn_compiler.planning.site import Site
from attn_compiler.targets import around, corrected
from attn_compiler.targets.exported import FIRST_QUERY, Q_POSITIONS, SCALES, UNROTATED, Call
from attn_compiler.targets.held_past import unremembered
from attn_compiler.targets.onnx.codes import Codes
from attn_compiler.targets.onnx.operators import not_coded
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.past import continued, remembered
from attn_compiler.targets.rows import without_cache
from attn_compiler.targets.tilings import Tilings
from attn_compiler.targets.torch_target import Result, Way, attend_torch
from attn_compiler.targets.traits import FIRST

DTYPES = ("float32", "float16", "float64")
CARRIED = ("feature", "seen", "mix", "delta", "gates", "unrotated", *around.CARRIED)

_library = torch.library.Library("attn_compiler", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("exported(Tensor[] operands, str what) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("exported_with_cache(Tensor[] operands, str what) -> (Tensor, Tensor, Tensor)")  # type: ignore[no-untyped-call]
_library.define("exported_with_state(Tensor[] operands, str what) -> (Tensor, Tensor, Tensor)")  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class OnnxTarget:
    """A local function of standard ONNX operators; `site` names the attention that it is made for."""

    site: str = ""
    decodes: bool = False  # whether its cache is the file's, which may hold it in few bits

    @property
    def name(self) -> str:
        return "onnx"

    def refuse(self, operands: Operands, variant: Variant, *, lse: bool = False) -> str | None:
        return "an exported attention has no log-sum-exp" if lse else None

    def attend(self, operands: Operands, variant: Variant, *, lse: bool = False) -> Result:
        """The attention as one function of its own name; agents gather for it by operators in front."""
        return around.around(operands, variant, lambda inner, one: (record(self.site, inner, one), None), attend_torch)

    def carry(self, site: Site, variant: Variant) -> Carried | Refusal:
        if site.recalls:
            behind = continued(variant)
            reason = objection(site, behind) or unremembered(site, behind)
            return Refusal(self.name, reason) if reason else Carried("an ONNX function behind a state", gains=True)
        reason = objection(site, without_cache(variant) if self.decodes else variant)
        reason = reason or (not_coded(site, variant) if variant.storage.kv_cache else None)
        if reason:
            return Refusal(self.name, reason)
        plain = variant == Variant(scale=variant.scale) and variant.score == score and variant.normalizer == SOFTMAX
        return Carried(
            "an ONNX function of standard operators", gains=not (plain and site.form == "scaled_dot_product_attention")
        )


def record(site: str, operands: Operands, variant: Variant) -> Tensor:
    """Put the operator into the graph that is traced; `site` names the attention that it stands for."""
    if operands.past:
        operands, variant = _from_new(operands, variant)
    tables = {name: operands.tables[name] for name in sorted(variant.tables())}
    if operands.unrotated and any(part.unrotated for part in variant.parts()):
        tables |= dict(zip(UNROTATED, operands.unrotated, strict=True))
    first, at = operands.first_query, operands.q_positions
    if isinstance(at, Tensor):
        tables[Q_POSITIONS] = at
    elif isinstance(first, torch.SymInt) and at is not None:
        tables[FIRST_QUERY] = torch.ops.aten.full.default([], first, dtype=torch.int64)
    counted = first if isinstance(first, int) and at is not None else None
    call = Call(site, variant, tuple(tables), counted, operands.layer, operands.layers, remembers=bool(operands.past))
    given = [operands.q, operands.k, operands.v]
    if operands.past:
        (past,) = operands.past
        given += [past[:, :, :-1], past[:, :, -1:]]
        return torch.ops.attn_compiler.exported_with_state([*given, *tables.values()], call.write())[0]  # type: ignore[no-any-return]
    return torch.ops.attn_compiler.exported([*given, *tables.values()], call.write())  # type: ignore[no-any-return]


def _from_new(operands: Operands, variant: Variant) -> tuple[Operands, Variant]:
    """The same call where places count from the first new token: a file does not know how many were before."""
    before, own = operands.k_positions, Call("", variant, (), None, 0, 0).along_keys
    assert not isinstance(before, Tensor)
    cut = {name: x[..., before:] if name in own and x.shape[-1] != 1 else x for name, x in operands.tables.items()}
    variant = variant.map(lambda x: x.substitute({table(FIRST): const(0)}))
    return replace(operands, tables=cut, k_positions=0), variant


def objection(site: Site, variant: Variant) -> str | None:
    """Why a site cannot be exported; None if it can."""
    if site.dtype not in DTYPES:
        return f"onnxruntime's CPU computes in {', '.join(DTYPES)}; found {site.dtype}"
    if any(part.dropout for part in variant.parts()):
        return "its dropout is active: call `model.eval()`"
    derived = [table.name for part in variant.parts() for table in part.derived]
    if derived and isinstance(site.k_len, str):
        return f'the table "{derived[0]}" follows from the number of keys, which changes from call to call'
    return uncarried(variant)


def uncarried(variant: Variant) -> str | None:
    """What of a variant has no spelling as standard operators here; None: nothing."""
    if any(part.mix is not None and part.mix.how is How.LSE for part in variant.parts()):
        return "its branches are mixed by log-sum-exp, which exported attentions do not have"
    inner = any(branch.output or branch.context for part in variant.parts() if part.mix for _, branch in part.mix.branches)
    if inner:
        return "what becomes of the keys of a branch, or of its result, is no part of an exported attention"
    uncorrected = next(filter(None, map(corrected.refuse, variant.parts())), None)
    return uncorrected or passed_over(variant, CARRIED) or around.refuse(variant)


def attend_eagerly(operands: Sequence[Tensor], what: str) -> Tensor:
    """What the exported function computes, by PyTorch's operators."""
    call = Call.read(what)
    return attend_by(operands, call, Tilings(call.variant, {})).contiguous()


def attend_by(operands: Sequence[Tensor], call: Call, by: Tilings) -> Tensor:
    """The same, tokens laid out as lists say where there are any; a first position may be a tensor or a size."""
    return attend_torch(_given(call, operands[:3], operands[3:]), by.variant, way=Way(lay_out=by.lay_out))[0]


def _given(call: Call, qkv: Sequence[Tensor], given: Sequence[Tensor], past: tuple[Tensor, ...] = ()) -> Operands:
    q, k, v = qkv
    tables, heads = dict(zip(call.tables, given, strict=True)), q.shape[1]
    unrotated = tuple(tables.pop(name) for name in UNROTATED if name in tables)
    first: Any = tables.pop(FIRST_QUERY, call.first)
    at = tables.get(Q_POSITIONS, int(first) if isinstance(first, Tensor) else first)
    return Operands(
        q, k, v, tables, at, 0, tuple(range(heads)), heads, k.shape[1], call.layer, call.layers, past=past,
        unrotated=(unrotated[0], unrotated[1]) if unrotated else None,
    )  # fmt: skip


def attend_with_cache(operands: Sequence[Tensor], what: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same where q, k and v are followed by the keys and values of a cache; and what the next call is given of both."""
    q, k, v, past_k, past_v, *tables = operands
    call = Call.read(what)
    assert call.held is not None
    scales = tables[-len(SCALES) :] if call.codes else []
    codes = Codes(call.codes)
    new = [codes.encode(x, scale) for x, scale in zip((k, v), scales, strict=True)] if scales else [k, v]
    keys, values = held = [torch.cat([past, x], dim=2) for past, x in zip((past_k, past_v), new, strict=True)]
    if scales:
        keys, values = (codes.decode(x, scale) for x, scale in zip(held, scales, strict=True))
    count = keys.shape[2]
    tables = [x[..., -count:] if name in call.along_keys else x for name, x in zip(call.tables, tables, strict=True)]
    out = attend_eagerly([q, keys, values, *tables], what)
    return out, _let_go(held[0], *call.held), _let_go(held[1], *call.held)


def attend_with_state(operands: Sequence[Tensor], what: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same where a state stands for earlier tokens, its features and what it has seen; and both after these tokens."""
    call = Call.read(what)
    *qkv, features, seen = operands[:5]
    given = _given(call, qkv, operands[5:], (torch.cat([features, seen], dim=2),))
    out, _ = attend_torch(given, call.variant)
    state = remembered(given, call.variant, *given.past)
    return out.contiguous(), state[:, :, :-1], state[:, :, -1:]


def _let_go(x: Tensor, first: int, latest: int) -> Tensor:
    return torch.cat([x[:, :, :first], x[:, :, max(x.shape[2] - latest, first) :]], dim=2)


def _shapes(operands: Sequence[Tensor], what: str) -> tuple[Tensor, Tensor, Tensor]:
    """What is let go is not counted: nothing of the graph depends on it."""
    q, k, v, past_k, past_v, *_ = operands
    held = [torch.cat([past, x[..., : past.shape[3]].to(past.dtype)], dim=2) for past, x in ((past_k, k), (past_v, v))]
    return _shape([q, k, v], what), held[0], held[1]


def _states(operands: Sequence[Tensor], what: str) -> tuple[Tensor, Tensor, Tensor]:
    return _shape(operands[:3], what), torch.empty_like(operands[3]), torch.empty_like(operands[4])


def _shape(operands: Sequence[Tensor], what: str) -> Tensor:
    q, _, v, *_ = operands
    return q.new_empty((*q.shape[:3], v.shape[3]))


_library.impl("exported", attend_eagerly, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("attn_compiler::exported", _shape, lib=_library)
_library.impl("exported_with_cache", attend_with_cache, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("attn_compiler::exported_with_cache", _shapes, lib=_library)
_library.impl("exported_with_state", attend_with_state, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("attn_compiler::exported_with_state", _states, lib=_library)
