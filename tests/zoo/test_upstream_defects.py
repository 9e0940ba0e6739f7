"""What others get wrong, we leave alone or reproduce as it is written."""

from __future__ import annotations

from zoo.catalogue import ZOO
from zoo.finding import find
from zoo.rebuilding import rebuild


def test_a_softmax_over_the_queries_is_no_attention_and_is_reported() -> None:
    """Inductor's own patterns fuse it as if it were one over the keys."""
    matches = find(*ZOO["neg_bilinear_softmax_wrongdim"].make("torch"))
    assert matches.sites == ()
    assert [miss.anchor for miss in matches.near_misses] == ["softmax"]


def test_a_bias_that_a_model_adds_twice_is_added_twice() -> None:
    """Falcon's eager attention adds its ALiBi to a mask that holds it already."""
    found = rebuild(*ZOO["falcon_alibi"].make("eager"))
    assert found.exact == ZOO["falcon_alibi"].found, found.reason
