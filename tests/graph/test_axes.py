"""Atoms survive whatever views do to the dimensions they make up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from attn_compiler.algebra.expr import h
from attn_compiler.graph.atom import coordinates, product
from attn_compiler.graph.axes import Atoms
from attn_compiler.graph.mutation import Versions
from attn_compiler.graph.names import Place, layer_numbers, module_path, place

factors = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def cut(sizes: list[int], places: list[bool]) -> list[int]:
    """Merge neighbors wherever `places` says so."""
    result = [sizes[0]]
    for size, merged in zip(sizes[1:], places, strict=False):
        if merged:
            result[-1] *= size
        else:
            result.append(size)
    return result


@given(factors, st.lists(st.booleans(), min_size=5, max_size=5), st.lists(st.booleans(), min_size=5, max_size=5))
def test_a_reshape_and_its_inverse_keep_every_atom_in_place(sizes: list[int], before: list[bool], after: list[bool]) -> None:
    atoms = Atoms()
    old, new = cut(sizes, before), cut(sizes, after)
    axes = atoms.fresh(old)
    there = atoms.reshape(axes, new)
    if there is None:
        return
    assert [product(axis) for axis in there] == new
    back = atoms.reshape(there, old)
    assert back is not None

    def large(axis: tuple[object, ...]) -> list[object]:
        return [atom for atom in atoms.resolve(axis) if not atom.is_unit]  # type: ignore[arg-type, attr-defined]

    assert [large(axis) for axis in back] == [large(axis) for axis in axes]


def test_a_dimension_that_cuts_through_an_atom_is_refused() -> None:
    atoms = Atoms()
    assert atoms.reshape(atoms.fresh([4, 6]), [3, 8]) is None


def test_unifying_two_axes_splits_the_coarser_one() -> None:
    atoms = Atoms()
    (heads,), (groups, repeats) = atoms.fresh([8]), atoms.fresh([2, 4])
    assert atoms.unify(heads, groups + repeats)
    assert atoms.resolve(heads) == atoms.resolve(groups + repeats)
    assert not atoms.unify(atoms.fresh([6])[0], atoms.fresh([4])[0])


def test_the_coordinates_of_atoms_count_up_to_the_index_of_their_axis() -> None:
    atoms = Atoms()
    (groups,), (repeats,) = atoms.fresh([2, 4])
    assert coordinates((groups, repeats), h) == {repeats: h % 4, groups: h // 4}


def recorded(f: object, *args: torch.Tensor) -> fx.Graph:
    return make_fx(f, pre_dispatch=True)(*args).graph  # type: ignore[arg-type]


def test_a_reader_sees_the_last_write_to_the_same_tensor() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        y.mul_(2)
        return y.exp()

    graph = recorded(f, torch.ones(3))
    add, mul, exp = (node for node in graph.nodes if node.op == "call_function")
    assert Versions(graph).read(add, exp) is mul
    assert Versions(graph).read(add, mul) is add


def test_a_write_through_a_view_is_not_followed() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        y.view(-1)[0] = 0
        return y.exp()

    graph = recorded(f, torch.ones(3, 2))
    nodes = {node.target: node for node in graph.nodes if node.op == "call_function"}
    assert Versions(graph).read(nodes[torch.ops.aten.add.Tensor], nodes[torch.ops.aten.exp.default]) is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].model.layers[3].self_attn", "model.layers.3.self_attn"),
        ("L['self']._modules['encoder']._modules['layer']._modules['0'].attention.self", "encoder.layer.0.attention.self"),
        ("L['self'].__dict__['_modules']['blocks'].0.attn", "blocks.0.attn"),
        ("model.layers.3.self_attn", "model.layers.3.self_attn"),
        ("", ""),
    ],
)
def test_module_paths_are_written_with_dots(path: str, name: str) -> None:
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"key": (path, torch.nn.Module)}
    assert module_path(node) == name


def numbered(*paths: str) -> list[int | None]:
    return [layer for layer, _ in layer_numbers([Place(path) for path in paths])]


def test_layers_are_counted_by_the_number_that_varies() -> None:
    assert numbered("layers.4.attn", "layers.5.attn", "") == [4, 5, None]
    assert numbered("decoder.block.1.layer.1.attn", "decoder.block.2.layer.1.attn") == [1, 2]
    assert numbered("stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0") == [0, 1, 2]


def test_an_encoder_and_a_decoder_count_their_layers_apart() -> None:
    places = [
        Place(f"{part}.layers.{layer}.attn") for part, layers in (("encoder", 2), ("decoder", 3)) for layer in range(layers)
    ]
    assert layer_numbers(places) == [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]


def test_layers_of_several_stages_are_one_stack() -> None:
    places = [Place(f"stages.{stage}.blocks.{block}") for stage in range(2) for block in range(2)]
    assert layer_numbers(places) == [(0, 4), (1, 4), (2, 4), (3, 4)]


def called(*stack: tuple[str, str]) -> Place:
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {key: (path, torch.nn.Module) for key, path in stack}
    return place(node)


def test_a_block_that_is_called_again_is_a_further_layer() -> None:
    places = [called(("1", "L['self'].encoder"), (f"2{call}", "L['self'].encoder.groups.0")) for call in ("", "@1", "@2")]
    assert layer_numbers(places) == [(0, 3), (1, 3), (2, 3)]


def test_a_model_that_is_called_again_has_the_same_layers() -> None:
    places = [called((f"1{call}", "L['self'].tower"), ("2@1", "L['self'].tower.layers.0")) for call in ("@1",)]
    places += [called(("1@1", "L['self'].tower"), ("3@1", "L['self'].tower.layers.1"))]
    places += [called(("1", "L['self'].tower"), (f"{n + 2}", f"L['self'].tower.layers.{n}")) for n in range(2)]
    assert layer_numbers(places) == [(0, 2), (1, 2), (0, 2), (1, 2)]


def test_the_product_of_no_atoms_is_one() -> None:
    assert product(()) == math.prod(())
