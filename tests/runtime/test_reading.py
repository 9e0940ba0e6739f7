"""What a call refuses of a variant that was made by hand, where only a model has what it asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import attn_compiler as attn
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.storage import Held, Numbers, Shared
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import LanguageError
from attn_compiler.testing import check_variant, variant_of

QKV = [torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))] * 3
CALLS: dict[str, Callable[[Variant], object]] = {
    "attend": lambda variant: attn.attend(*QKV, variant),  # type: ignore[call-arg, misc]
    "reference": lambda variant: attn.reference(*QKV, variant),  # type: ignore[call-arg, misc]
    "step": lambda variant: attn.step(*QKV, variant),  # type: ignore[call-arg, misc]
    "kernel_source": lambda variant: attn.kernel_source(variant, q_len=5, k_len=5, heads=2, head_dim=8),
    "schedule": lambda variant: attn.schedule(variant, 5, 5, heads=2),
    "check_variant": lambda variant: check_variant(variant, dtypes=(torch.float32,)),
}
INT8 = Held(Numbers("int8", 8, mantissa=7, smallest=7, largest=127), Shared("token"))
LINEAR = variant_of({"mask": "causal", "normalizer": "linear"}, heads=2, kv_heads=2)


@pytest.mark.parametrize("name", CALLS)
def test_no_call_leaves_out_that_projections_are_held_otherwise(name: str) -> None:
    call = CALLS[name]
    asking = LINEAR.projected(INT8)
    for variant in (asking, replace(LINEAR, groups=((IntegerSet((slice(0, 1),)), asking),))):
        with pytest.raises(LanguageError, match=r"layers around an attention.*policy of a compiled model"):
            call(variant)
