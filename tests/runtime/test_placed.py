"""Keys that a cache holds only some of stand where they belong, or it is said that the others are gone."""

from __future__ import annotations

import pytest
import torch

from attn_compiler.errors import ShapeError
from attn_compiler.planning.kept import Kept
from attn_compiler.runtime.placed import placed


def test_each_key_stands_in_its_place_and_zeros_in_all_others() -> None:
    held, places = torch.randn(2, 3, 4, 5), torch.tensor([[0, 1, 6, 7], [2, 3, 6, 7]])
    whole = placed(held, places, 8, Kept(2, 1), suffices=True)
    for row in range(2):
        assert torch.equal(whole[row, :, places[row]], held[row])
    assert whole.count_nonzero() == held.count_nonzero()


def test_without_places_keys_are_the_latest() -> None:
    held = torch.randn(1, 2, 3, 4)
    assert torch.equal(placed(held, None, 5, Kept(0, 2), suffices=True)[:, :, 2:], held)


def test_what_is_gone_is_missed_only_where_it_is_seen() -> None:
    held = torch.randn(1, 2, 3, 4)
    assert torch.equal(placed(held, None, 3, Kept(0, 2), suffices=False), held)
    with pytest.raises(ShapeError, match="holds the latest 2 tokens, and the model attends to more: compile it"):
        placed(held, None, 5, Kept(0, 2), suffices=False)
