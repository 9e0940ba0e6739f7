"""The parameters that variants add to a model: names, shapes, what they start as, and when a file of them is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from attn_compiler import library
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import PolicyError
from attn_compiler.planning.parameter_file import steps_of, write_parameters
from attn_compiler.planning.parameters import Parameter, all_parameters
from attn_compiler.planning.plan import Decision
from attn_compiler.planning.planner import plan
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.runtime.reading import read_variant
from attn_compiler.targets.choice import TorchTarget

SITE = Site(
    "layers.1.attention", Kind.SELF, Phase.PREFILL, 1, 3, 2, 4, 2, 16, 16, 8, 8, "float32", Variant(), Frame(), 16, 16
)  # fmt: skip
BRANCHES = {"near": {"mask": "window(4)"}, "far": {"feature": "hedgehog"}}


def variant_of(slots: object) -> Variant:
    return read_variant(
        slots, Variant(), heads=4, kv_heads=2, q_len=16, k_len=16, head_dim=8, values=None, layer=1, layers=3
    )  # fmt: skip


def parameters(slots: object, site: Site = SITE) -> dict[str, Parameter]:
    variant = variant_of(slots)
    return all_parameters([(variant, site)], variant.tables())


def test_maps_of_features_have_a_part_for_each_layer_and_head_and_start_as_the_identity() -> None:
    found = parameters({"feature": "hedgehog"})
    assert {name: one.shape for name, one in found.items()} == {"hedgehog_q": (3, 4, 8, 8), "hedgehog_k": (3, 4, 8, 8)}
    assert all(np.array_equal(one.start()[2, 3], np.eye(8)) for one in found.values())


@pytest.mark.parametrize(
    ("slots", "number"),
    [
        ({"mix": {"how": "gate", "branches": BRANCHES, "weights": {"near": "share"}}}, 0.0),
        ({"mix": {"how": "shared_denominator", "branches": BRANCHES, "weights": {"near": "sigmoid(share)"}}}, 0.0),
        ({"mix": {"how": "shared_denominator", "branches": BRANCHES, "weights": {"near": "share"}}}, 1.0),
        ({"mix": {"how": "sum", "branches": BRANCHES, "weights": {"near": "2 * share"}}}, 1.0),
        ({"scale": "share / sqrt(dim)"}, 1.0),
        ({"scale": "(1 + share) / sqrt(dim)"}, 0.0),
        ({"score": "score + share"}, 0.0),
        ({"score": "score * share"}, 1.0),
        ({"normalizer": "softmax(sink=share)"}, 0.0),
    ],
)  # fmt: skip
def test_a_number_starts_so_that_nothing_vanishes_and_little_is_added(slots: object, number: float) -> None:
    start = parameters(slots)["share"].start()
    assert start.shape == (3, 4)
    assert np.array_equal(start, np.full((3, 4), number))


def test_what_is_read_by_tokens_is_no_parameter() -> None:
    with pytest.raises(PolicyError, match=r'layers\.1\.attention: "gate" is read at `b, q`, whose size is no part of the model'):
        parameters({"feature": "identity", "state": "gate(scalar)"})


def test_sites_that_would_share_a_part_of_a_parameter_are_an_error() -> None:
    variant = variant_of({"feature": "hedgehog"})
    other = replace(SITE, name="decoder.1.attention")
    with pytest.raises(
        PolicyError, match=r"layers\.1\.attention and decoder\.1\.attention \(layer 1\) would share the parameter"
    ):
        all_parameters([(variant, SITE), (variant, other)], variant.tables())
    narrow = replace(SITE, name="layers.2.attention", layer=2, heads=2)
    with pytest.raises(PolicyError, match=r"layers 1 and 2\) would share .* in two shapes"):
        all_parameters([(variant, SITE), (variant, narrow)], variant.tables())


def decided(folder: Path, values: dict[str, np.ndarray], steps: int, rule: str = "") -> Decision:
    write_parameters(folder / "maps.safetensors", values, steps)
    (folder / "p.yaml").write_text(f"version: 1\nparameters: maps.safetensors\nrules: [{{attn: {{feature: hedgehog}}{rule}}}]")
    return plan((SITE,), library.load_policy(folder / "p.yaml"), (TorchTarget(),)).decisions[0]


def maps(*shape: int) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name in ("hedgehog_q", "hedgehog_k")}


def test_parameters_that_nobody_trained_are_refused_unless_the_rule_allows_them(tmp_path: Path) -> None:
    refused = decided(tmp_path, maps(3, 4, 8, 8), 0)
    assert refused.refusals[0].reason == (
        "it has parameters, hedgehog_k, hedgehog_q, that nobody trained since maps.safetensors was made: attn.distill trains "
        "them, `untrained: allow` does without"
    )
    assert not decided(tmp_path, maps(3, 4, 8, 8), 0, ", untrained: allow").refused
    assert not decided(tmp_path, maps(3, 4, 8, 8), 7).refused


def test_parameters_of_another_model_are_refused_by_their_shapes(tmp_path: Path) -> None:
    found = decided(tmp_path, maps(2, 4, 8, 8), 7)
    assert found.refusals[0].reason == (
        'of its parameters in maps.safetensors, "hedgehog_k" is [2, 4, 8, 8], and this model needs [3, 4, 8, features], leading '
        "axes as far as they matter"
    )
    assert not decided(tmp_path, maps(4, 8, 5), 7).refused


def test_without_a_file_a_rule_may_allow_what_nobody_trained() -> None:
    policy = library.load_policy("version: 1\nrules: [{attn: {feature: hedgehog}, untrained: allow}]")
    assert plan((SITE,), policy, (TorchTarget(),)).decisions[0].outcome == "approximate"
    data = library.load_policy("version: 1\nrules: [{attn: {feature: elu_one, state: gate(scalar)}, untrained: allow}]")
    assert "is read at `b, q`" in plan((SITE,), data, (TorchTarget(),)).decisions[0].refusals[0].reason


def test_while_the_file_is_not_written_any_name_may_be_a_parameter(tmp_path: Path) -> None:
    text = 'version: 1\nparameters: new.safetensors\nrules: [{attn: {score: "score + share"}}]'
    (tmp_path / "p.yaml").write_text(text)
    found = plan((SITE,), library.load_policy(tmp_path / "p.yaml"), (TorchTarget(),)).decisions[0]
    assert found.refusals[0].reason == "it has parameters, share, which new.safetensors does not hold"
    write_parameters(tmp_path / "new.safetensors", {"other": np.zeros(3, np.float32)}, 1)
    with pytest.raises(PolicyError, match='there is no "share"'):
        library.load_policy(tmp_path / "p.yaml")


def test_a_file_of_parameters_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    write_parameters(path, maps(8, 8), 3)
    before = path.read_bytes()
    with pytest.raises(SafetensorError, match="object"):
        write_parameters(path, {"hedgehog_q": np.array([object()])}, 4)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["maps.safetensors"]
    assert steps_of(path) == 3
    with pytest.raises(PolicyError, match=r"written as \.safetensors"):
        write_parameters(tmp_path / "maps.npz", maps(8, 8), 3)
