"""Every attention of the zoo is computed again by our operator, from what was recovered of it, and nothing changes.

*Found* means: re-emitted from its formula and tables as the policy `exact` would, with outputs and gradients equal. One
difference anywhere in a model counts all of its sites as not found. Left out of the count are the composites
(`Outcome.FRAGMENTS`: Longformer, the sparse BigBird, reported piecewise) and the traps that must be refused
(`Outcome.REFUSED`: `inplace_setitem`, `inplace_view_alias`, `q_mutated_between`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from zoo.catalogue import FAMILIES, ZOO
from zoo.entry import Outcome
from zoo.rebuilding import Rebuilt, in_precision, rebuild

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

WAYS = {
    f"{phase}-{dtype}-{lengths}": {"train": phase == "training", "dtype": getattr(torch, dtype), "dynamic": lengths == "dynamic"}
    for phase, dtype, lengths in itertools.product(("inference", "training"), ("float32", "bfloat16"), ("static", "dynamic"))
}
LEAST_FOUND = 0.99
# They have no gradients themselves: flex has none on a CPU, the other writes over what its own gradient needs.
ONLY_INFERRED = {"flex_hop", "inplace_after_use"}
COUNTED = [entry for entry in ZOO.values() if entry.outcome is not Outcome.FRAGMENTS]


def _rebuilt(name: str, implementation: str, *, train: bool, dtype: torch.dtype, dynamic: bool) -> Rebuilt:
    model, inputs = in_precision(dtype, *ZOO[name].make(implementation))
    return rebuild(model, inputs, train=train, dynamic=dynamic)


def _configurations(names: set[str]) -> Iterator[tuple[str, str]]:
    for entry in COUNTED:
        if entry.name in names:
            yield from ((entry.name, implementation) for implementation in entry.implementations)


@pytest.mark.parametrize(("name", "implementation"), list(_configurations(QUICK)))
def test_every_attention_of_a_model_is_computed_again_from_its_formula(name: str, implementation: str) -> None:
    found = _rebuilt(name, implementation, train=name not in ONLY_INFERRED, dtype=torch.float32, dynamic=False)
    assert len(found.sites) == ZOO[name].found, found.reason
    assert found.exact == ZOO[name].found, found.reason


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
def test_nearly_all_attentions_are_found_and_nothing_else(way: str) -> None:
    expected, found, invented, misses = 0, 0, 0, []
    for name, implementation in _configurations(set(ZOO) - (ONLY_INFERRED if WAYS[way]["train"] else set())):
        one, sites = _rebuilt(name, implementation, **WAYS[way]), ZOO[name].found or 0  # type: ignore[arg-type]
        expected, found = expected + sites, found + min(sites, one.exact)
        invented += max(0, len(one.sites) - sites)
        if one.exact != sites:
            misses.append(f"{name:24} {implementation:6} {one.exact} of {sites}: {one.reason}")
    print(f"{way}: {found} of {expected}", *misses, sep="\n")
    assert invented == 0, "\n".join(misses)
    assert found >= LEAST_FOUND * expected, "\n".join(misses)
