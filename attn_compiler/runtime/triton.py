"""The target of generated Triton: which calls its kernels can run, and at which sites they should."""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
from torch import Tensor

from attn_compiler.algebra.variant import Variant, without_total
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.planner import Carried
from attn_compiler.planning.site import Phase, Site
from attn_compiler.runtime import branches, interpreter, linear
from attn_compiler.runtime.coded_rows import codes_objection, of_rows
from attn_compiler.runtime.cpp import DTYPES, objection, of_unseeing
from attn_compiler.runtime.gather import by_triton
from attn_compiler.runtime.operator import CODES, attend_generated, dtype_name
from attn_compiler.targets.around import around
from attn_compiler.targets.cpp.decode import MOST_QUERIES
from attn_compiler.targets.cpp.spec import Stored
from attn_compiler.targets.held import lost
from attn_compiler.targets.held_past import states, unremembered
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.past import continued
from attn_compiler.targets.torch_target import Result, Way, attend_torch
from attn_compiler.targets.torch_target import refuse as refuse_torch
from attn_compiler.targets.triton.coded import needs_e4m3
from attn_compiler.targets.triton.coded import objection as of_storage

WIDEST = 256  # numbers of a head, up to which a tile fits
LEAST_E4M3 = (8, 9)
PLAIN = Variant()
UNMET = "beside states its kernels know no gradient of a decay's rate"
TAKES = linear.Takes(math.inf, few=True, gates=True)  # features are cut into pieces, and few tokens meet one by one


class TritonTarget:
    """Kernels in Triton, generated for one variant and compiled by it for the GPU at hand."""

    name = "triton"

    def refuse(self, operands: Operands, variant: Variant, *, lse: bool = False) -> str | None:
        q, v = operands.q, operands.v
        if not lse and linear.gathers(operands, variant, TAKES):
            return _machine(q.device.type, dtype_name(q.dtype))
        if not lse and branches.serves(operands, variant, self.refuse):
            return None
        if operands.past:
            return refuse_torch(variant, lse=lse) or ("beside states its kernels know no log-sum-exp" if lse else UNMET)
        stored = {name: Stored(dtype_name(table.dtype), table.ndim) for name, table in operands.tables.items()}
        counted = operands.first_query is not None, not isinstance(operands.k_positions, Tensor)
        where = _machine(q.device.type, dtype_name(q.dtype), max(q.shape[-1], v.shape[-1]), variant)
        reason = where or objection(variant, counted, stored, operands.differentiated, of_storage)
        return reason or (without_total(variant) or of_unseeing(operands, variant) if lse else None)

    def attend(self, operands: Operands, variant: Variant, *, lse: bool = False) -> Result:
        if operands.codes and not codes_objection(operands, variant):
            return attend_generated(*of_rows(operands, variant), CODES[self.name], lse=lse)
        if not lse and (linear.gathers(operands, variant, TAKES) or branches.serves(operands, variant, self.refuse)):
            kernel = branches.kernel(self.refuse, self.attend)
            return attend_torch(operands, variant, way=Way(states=by_triton(operands.q.dtype), kernel=kernel))
        return around(operands, variant, lambda inner, one: attend_generated(inner, one, self.name, lse=lse))

    def carry(self, site: Site, variant: Variant) -> Carried | Refusal:
        if site.device != "cuda":
            return Refusal(self.name, f"its kernels are for GPUs; found {site.device}")
        if site.recalls:
            return self._behind_states(site, continued(variant))
        missed = lost(site, variant)
        by_parts = None if missed else branches.carried(site, variant, self.carry)
        if by_parts:
            return by_parts
        gathered, dim = linear.by_states(site, variant, TAKES), max(site.head_dim, site.value_dim)
        if gathered and not missed and not _machine(site.device, site.dtype):
            return Carried(linear.form(variant, gathered), gains=False)
        reason = missed or _machine(site.device, site.dtype, dim, variant)
        counted = site.kept is None or not site.kept.first  # first tokens in front of the latest stand where a table says
        reason = reason or objection(variant, (counted, counted), {}, site.phase is Phase.TRAIN, of_storage)
        read = ", which reads the codes of the cache" if site.computes.storage.kv_cache and site.q_hint <= MOST_QUERIES else ""
        return Refusal(self.name, reason) if reason else Carried(f"a generated kernel{read}", gains=False)

    def _behind_states(self, site: Site, variant: Variant) -> Carried | Refusal:
        """How a site is carried where states stand for keys that are gone."""
        gathered = linear.by_states(site, variant, TAKES)
        reason = refuse_torch(variant) or unremembered(site, variant) or _machine(site.device, site.dtype)
        reason = reason or (None if len(gathered) >= len(states(variant, site.heads)) else UNMET)
        form = f"{linear.form(variant, gathered)}, which begin with those of the cache"
        return Refusal(self.name, reason) if reason else Carried(form, gains=True)


def _machine(device: str, dtype: str, dim: int = 0, variant: Variant = PLAIN) -> str | None:
    interpreted = device == "cpu" and interpreter.is_interpreting()
    if not (device == "cuda" or interpreted) or dtype not in DTYPES:
        return f"its kernels take {', '.join(DTYPES)} on a GPU, or on the CPU with TRITON_INTERPRET=1; found {dtype} on {device}"
    if dim > WIDEST:
        return f"its kernels take heads of up to {WIDEST} numbers; found {dim}"
    if not find_spec("triton"):
        return "Triton is missing: pip install triton"
    known = device == "cuda" and torch.cuda.is_available()
    return _too_old(*torch.cuda.get_device_capability()) if known and needs_e4m3(variant) else None


def _too_old(major: int, minor: int) -> str | None:
    if torch.version.hip is not None or (major, minor) >= LEAST_E4M3:
        return None
    least = ".".join(map(str, LEAST_E4M3))
    return f"its kernels multiply floats of e4m3 on GPUs of compute capability {least} or more; found {major}.{minor}"
