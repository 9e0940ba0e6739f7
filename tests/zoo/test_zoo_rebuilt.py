"""Every attention of the zoo is computed again by our operator, from what was recovered of it, and nothing changes.

*Rebuilt* means: re-emitted from its formula and tables as the policy `exact` would, with outputs and gradients equal. One
difference anywhere in a model counts all of its sites as not rebuilt. Left out of the count are the composites
(`Outcome.FRAGMENTS`: Longformer, the sparse BigBird, reported piecewise) and the traps that must be refused
(`Outcome.REFUSED`: `inplace_setitem`, `inplace_view_alias`, `q_mutated_between`).
"""

from __future__ import annotations

import pytest
import torch

from zoo.catalogue import FAMILIES, ZOO
from zoo.sweep import ONLY_INFERRED, WAYS, Way, configurations, sweep

# One model for each thing that is hard to recover; the mark `full` asks about all of them, in all ways.
SAMPLE = (
    "llama",
    "gemma2",
    "gpt_oss",
    "bloom",
    "xlnet",
    "swin",
    "dit",
    "t5_pad",
    "gemma3_mm_prefix",
    "llama_packed",
    "falcon_alibi",
)
QUICK = {*SAMPLE, *(entry.name for family in ("torch_modules", "handwritten", "negatives") for entry in FAMILIES[family])}

LEAST_FOUND, LEAST_REBUILT = 0.99, 0.97


@pytest.mark.parametrize(("name", "implementation"), [one for one in configurations() if one[0] in QUICK])
def test_every_attention_of_a_model_is_computed_again_from_its_formula(name: str, implementation: str) -> None:
    found = Way(train=name not in ONLY_INFERRED, dtype=torch.float32, dynamic=False).rebuild(name, implementation)
    assert len(found.sites) == ZOO[name].found, found.reason
    assert found.exact == ZOO[name].found, found.reason


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
def test_nearly_all_attentions_are_found_and_nothing_else(way: str) -> None:
    swept = sweep(WAYS[way])
    print(swept)
    assert swept.invented == 0, str(swept)
    assert swept.found >= LEAST_FOUND * swept.sites, str(swept)
    assert swept.rebuilt >= LEAST_REBUILT * swept.sites, str(swept)
