"""Models named on the command line get inputs that are random: measured on zeros, an approximation would look exact."""

from __future__ import annotations

import pytest

from attn_compiler.cli.model_source import Asked, build

SMALL = "num_layers=1,d_model=16,d_kv=8,d_ff=16,num_heads=2,vocab_size=50"
VIT = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,image_size=32,patch_size=8"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (f"hf:t5,{SMALL}", ("input_ids", "decoder_input_ids")),
        (f"hf:vit,{VIT}", ("pixel_values",)),
    ],
)
def test_every_input_of_a_named_model_is_random(source: str, names: tuple[str, ...]) -> None:
    built = build(source, Asked(length=16, batch=2, weights=True))
    assert all(built.kwargs[name].unique().numel() > 8 for name in names)


def test_a_decoder_does_not_read_what_the_encoder_reads() -> None:
    given = build(f"hf:t5,{SMALL}", Asked(length=16, weights=True)).kwargs
    assert not given["input_ids"].equal(given["decoder_input_ids"])


def test_the_same_name_gives_the_same_inputs() -> None:
    one, two = (build(f"hf:vit,{VIT}", Asked(weights=True)).kwargs["pixel_values"] for _ in range(2))
    assert one.equal(two)
