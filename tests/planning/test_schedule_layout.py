"""The order that suits a mask makes it block sparse."""

import numpy as np
import pytest

from attn_compiler.algebra.expr import Expr, k, q, same
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.layout import dilation, natural_order
from attn_compiler.planning.schedule import schedule


@pytest.mark.parametrize(
    ("mask", "step"),
    [
        (same((q - k) % 4, 0), 4),
        ((k <= q) & same((k - q) % 6, 0) & same((q - k) % 4, 0), 12),
        (same((q - k) % 4, 0) | (k < 4), 1),
        (same((q - k) % 4, 1), 1),
        (same(q % 4, 0), 1),
    ],
)
def test_the_dilation_is_the_step_every_visible_distance_shares(mask: Expr, step: int) -> None:
    assert dilation(mask) == step


def test_a_dilated_window_is_tiled_by_residue_class() -> None:
    variant = Variant(mask=(abs(q - k) < 256) & same((q - k) % 8, 0))
    order = natural_order(variant, 1030)
    assert order is not None
    assert sorted(order) == list(range(1030))
    assert order[:3].tolist() == [0, 8, 16]
    assert schedule(variant, 1030, 1030, order=order).density < schedule(variant, 1030, 1030).density / 2


def test_a_geometry_is_cut_into_square_tiles_and_other_tokens_keep_their_places() -> None:
    order = natural_order(Variant(), 5 + 16 * 16 + 2, [16, 16], before=5)
    assert order is not None
    assert order[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert order[5 + 7 : 5 + 9].tolist() == [5 + 7, 5 + 16]
    assert order[-2:].tolist() == [5 + 256, 5 + 257]
    assert np.array_equal(np.sort(order), np.arange(263))


def test_three_axes_share_a_tile() -> None:
    order = natural_order(Variant(), 8**3, [8, 8, 8])
    assert order is not None
    first = np.stack(np.unravel_index(order[:64], (8, 8, 8)))
    assert first.max(axis=1).tolist() == [3, 3, 3]


def test_a_line_of_tokens_without_dilation_stays_as_it_is() -> None:
    assert natural_order(Variant(mask=k <= q), 100, [100]) is None
