"""The matcher finds in every model of the zoo what is there, and nothing else."""

from __future__ import annotations

import pytest

from zoo.catalogue import FAMILIES, ZOO
from zoo.entry import Outcome
from zoo.finding import find

# One model for each thing that made matching hard; `make test-full` asks about all of them.
SAMPLE = {"llama", "gemma2", "gpt_oss", "diffllama", "bloom", "xlnet", "swin", "clip", "dit", "t5_pad", "gemma3_mm_prefix"}
QUICK = SAMPLE | {entry.name for family in ("torch_modules", "handwritten", "negatives") for entry in FAMILIES[family]}

# k is put together by writing into slices of an empty tensor, which the matcher does not follow.
MISSED = {("deepseek_v3", "sdpa")}


def _marks(name: str, implementation: str) -> list[pytest.MarkDecorator]:
    marks = [] if name in QUICK else [pytest.mark.full]
    return [*marks, pytest.mark.xfail(strict=True)] if (name, implementation) in MISSED else marks


CASES = [
    pytest.param(name, implementation, id=f"{name}-{implementation}", marks=_marks(name, implementation))
    for name, entry in ZOO.items()
    if entry.outcome is not Outcome.FRAGMENTS
    for implementation in entry.implementations
]
COMPOSITES = [name for name, entry in ZOO.items() if entry.outcome is Outcome.FRAGMENTS]


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_every_attention_of_a_model_is_found_and_nothing_else(name: str, implementation: str) -> None:
    matches = find(*ZOO[name].make(implementation))
    assert len(matches.sites) == ZOO[name].found, matches.near_misses


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.outcome is Outcome.REFUSED])
def test_a_trap_is_left_alone_with_a_reason(name: str) -> None:
    matches = find(*ZOO[name].make("torch"))
    assert matches.sites == ()
    assert all(miss.reason for miss in matches.near_misses)
    assert matches.near_misses


@pytest.mark.full
@pytest.mark.parametrize("name", COMPOSITES)
def test_every_piece_of_a_composite_is_reported(name: str) -> None:
    matches = find(*ZOO[name].make("eager"))
    assert len(matches.sites) + len(matches.near_misses) >= ZOO[name].sites


@pytest.mark.parametrize("name", ["llama", "bert", "nn_tenc_train", "bmm3d"])
@pytest.mark.parametrize("how", [{"grad": True}, {"train": True}, {"dynamic": True}], ids=["gradients", "training", "dynamic"])
def test_recall_does_not_depend_on_how_a_model_is_compiled(name: str, how: dict[str, bool]) -> None:
    entry = ZOO[name]
    matches = find(*entry.make(entry.implementations[0]), **how)
    assert len(matches.sites) == entry.found, matches.near_misses
