"""What `options` and `mode` of torch.compile say: policies, tables, values, Inductor's own settings, and mistakes in them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import attn_compiler as attn
from attn_compiler import torch_private as private
from attn_compiler.errors import PolicyError, TableError
from attn_compiler.testing import assert_within_budget
from end_to_end.models import WINDOW, double, like_llama, llama, near, tokens

quick = pytest.mark.usefixtures("quick")
SAME = {
    "version": 1,
    "labels": {"document": {"given": "documents"}},
    "rules": [{"match": {}, "attn": {"mask": "same(document)"}}],
}


class Block(nn.Module):
    """Self-attention, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * 8**-0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)


def check(out: Tensor, model: nn.Module, x: Tensor, seen: Tensor) -> None:
    with torch.no_grad():
        assert_within_budget(out.detach(), double(model)(x.double(), seen), model(x, seen))


def same(documents: Tensor) -> Tensor:
    return documents[:, None] == documents[None]


@quick
def test_an_unknown_option_is_an_error_with_the_nearest_word() -> None:
    compiled = torch.compile(Block(), backend="attn", options={"polycy": "exact"})
    with pytest.raises(BackendCompilerFailed, match=r'unknown key "polycy"; did you mean "policy"\?') as error:
        compiled(torch.randn(1, 16, 16))
    assert isinstance(error.value.inner_exception, PolicyError)


@quick
def test_options_of_inductor_are_suggested_too() -> None:
    compiled = torch.compile(Block(), backend="attn", options={"max_autotne": True})
    with pytest.raises(BackendCompilerFailed, match=r'did you mean "max_autotune"\?'):
        compiled(torch.randn(1, 16, 16))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"mode": "max-autotune-no-cudagraphs"}, {"max_autotune": True, "coordinate_descent_tuning": True}),
        ({"options": {"max_autotune": False, "triton.cudagraphs": False}}, {"max_autotune": False, "triton.cudagraphs": False}),
        ({"options": {"policy": "exact", "max-autotune": True}}, {"max_autotune": True}),
        ({"options": {"policy": "exact"}}, {}),
    ],
)
def test_options_and_mode_reach_inductor(
    arguments: dict[str, object], expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    patches: list[object] = []

    def watched(gm: torch.fx.GraphModule, inputs: list[Tensor], config_patches: object = None) -> Callable[..., object]:
        patches.append(config_patches)
        return gm.forward

    monkeypatch.setattr(private, "inductor", lambda: watched)
    torch.compile(Block(), backend="attn", **arguments)(torch.randn(1, 16, 16))
    assert patches == [expected]


@quick
def test_the_environment_names_a_policy_that_is_read_when_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "narrow.yaml"
    model, x = Block(), torch.randn(2, 16, 16)
    compiled = torch.compile(model, backend="attn")
    monkeypatch.setenv("ATTN_POLICY", str(path))
    path.write_text("version: 1\nrules: [{match: {}, attn: {mask: window(4)}}]\n")
    check(compiled(x), model, x, near(16, 4))
    path.write_text("version: 1\nrules: [{match: {}, attn: {mask: window(2)}}]\n")
    torch.compiler.reset()
    check(compiled(x), model, x, near(16, 2))
    own = torch.compile(model, backend="attn", options={"policy": "exact"})
    check(own(x), model, x, near(16, 16))


def test_the_backend_is_known_by_its_name_without_an_import() -> None:
    code = (
        "import torch\n"
        "f = torch.compile(lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, backend='attn', options={'policy': 'exakt'})\n"
        "try:\n    f(*torch.randn(3, 1, 2, 8, 8))\n"
        "except torch._dynamo.exc.BackendCompilerFailed as e:\n    print(type(e.inner_exception).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "PolicyError\n", done.stderr


@quick
def test_a_given_table_may_be_updated_in_place_between_calls() -> None:
    documents = torch.tensor([0] * 5 + [1] * 11)
    model, x = Block(), torch.randn(2, 16, 16)
    compiled = torch.compile(model, backend="attn", options={"policy": SAME, "tables": {"documents": documents}})
    check(compiled(x), model, x, same(documents))
    documents[:9] = 3
    before = len(attn.reports())
    check(compiled(x), model, x, same(documents))
    assert len(attn.reports()) == before


@quick
def test_inductors_code_reads_the_table_anew() -> None:
    documents = torch.tensor([0] * 5 + [1] * 11)
    model, x = Block(), torch.randn(2, 16, 16)
    compiled = torch.compile(model, backend="attn", options={"policy": SAME, "tables": attn.Tables(documents=documents)})
    check(compiled(x), model, x, same(documents))
    documents[:9] = 3
    check(compiled(x), model, x, same(documents))


@quick
def test_one_model_compiles_with_several_tables() -> None:
    model, x = Block(), torch.randn(2, 16, 16)
    for cut in (3, 9, 12):
        documents = (torch.arange(16) >= cut).long()
        options = {"policy": SAME, "tables": attn.Tables(documents=documents)}
        check(torch.compile(model, backend="attn", options=options)(x), model, x, same(documents))


def test_tables_are_the_same_if_their_tensors_are() -> None:
    first, second = torch.zeros(4), torch.zeros(4)
    assert attn.Tables(a=first) == attn.Tables({"a": first})
    assert hash(attn.Tables(a=first)) == hash(attn.Tables({"a": first}))
    assert attn.Tables(a=first) != attn.Tables(a=second)
    assert attn.Tables(a=first) != attn.Tables(b=first)
    assert attn.Tables(a=first) != {"a": second}
    assert dict(attn.Tables(a=first)) == {"a": first}


def test_tables_hold_tensors() -> None:
    with pytest.raises(TableError, match='table "a": expected a tensor, found list'):
        attn.Tables(a=[1, 2])  # type: ignore[arg-type]


class Packed(nn.Module):
    """A model that takes the documents' numbers, and passes them on."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.embedding = Block(), nn.Embedding(4, 16)

    def forward(self, x: Tensor, document_ids: Tensor) -> Tensor:
        return self.block(x + self.embedding(document_ids))


def by_input(name: str) -> dict[str, object]:
    return {**SAME, "labels": {"document": {"input": name}}}


@quick
def test_an_input_of_the_model_is_a_table() -> None:
    model, x = Packed(), torch.randn(2, 16, 16)
    compiled = torch.compile(model, backend="attn", options={"policy": by_input("document_ids")})
    for cut in (3, 9):
        documents = (torch.arange(16) >= cut).long().expand(2, -1)
        check(compiled(x, documents), model.block, x + model.embedding(documents).detach(), same(documents[0]))


@quick
def test_an_input_that_is_not_there_is_an_error_that_lists_those_there_are() -> None:
    compiled = torch.compile(Packed(), backend="attn", options={"policy": by_input("documents_id")})
    with pytest.raises(BackendCompilerFailed, match=r'reads the input "documents_id".*did you mean "document_ids"'):
        compiled(torch.randn(1, 16, 16), torch.zeros(1, 16, dtype=torch.long))


@quick
def test_values_name_what_a_geometry_leaves_open() -> None:
    policy = {"version": 1, "geometries": {"image": {"size": ["h", "w"]}},
              "rules": [{"match": {}, "attn": {"geometry": "image", "mask": "chunks([2, 2])"}}]}  # fmt: skip
    model, x = Block(), torch.randn(2, 16, 16)
    for height, width in ((4, 4), (2, 8)):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="attn", options={"policy": policy, "values": {"h": height, "w": width}})
        place = torch.arange(16)
        check(compiled(x), model, x, same(place // width // 2 * 100 + place % width // 2))


@quick
def test_a_table_may_be_held_by_the_policy() -> None:
    policy = {**SAME, "labels": {"document": {"values": [0] * 7 + [1] * 9}}}
    model, x = Block(), torch.randn(2, 16, 16)
    check(torch.compile(model, backend="attn", options={"policy": policy})(x), model, x, same(torch.arange(16) >= 7))


@quick
def test_a_policy_object_and_a_mapping_say_the_same() -> None:
    model, ids = llama().eval(), tokens()
    policy = attn.load_policy(WINDOW)
    with torch.no_grad():
        out = torch.compile(model, backend="attn", options={"policy": policy})(ids).last_hidden_state
        assert_within_budget(out, like_llama(ids, 8)(double(model)), like_llama(ids, 8)(model))


@pytest.mark.parametrize(("target", "first"), [("auto", "cpp"), ("cpp", "cpp"), ("torch", "torch")])
@quick
def test_one_target_may_be_named(target: str, first: str) -> None:
    model, ids = llama("eager").eval(), tokens(length=40)
    with torch.no_grad():
        out = like_llama(ids)(torch.compile(model, backend="attn", options={"policy": WINDOW, "target": target}))
        by_hand = like_llama(ids, 8)
        assert_within_budget(out, by_hand(double(model)), by_hand(model))
    assert [decision.target for decision in attn.reports()[-1].decisions] == [first, first]


@quick
def test_a_target_that_does_not_exist_is_an_error() -> None:
    compiled = torch.compile(Block(), backend="attn", options={"target": "tritn"})
    with pytest.raises(BackendCompilerFailed, match='there is no target "tritn"'):
        compiled(torch.randn(2, 20, 16))


@quick
def test_with_torch_operators_a_causal_model_is_the_same_bit_for_bit() -> None:
    model, ids = llama("sdpa").eval(), tokens(length=100)
    with torch.no_grad():
        out = torch.compile(model, backend="attn", options={"target": "torch"})(ids).last_hidden_state
        assert torch.equal(out, model(ids).last_hidden_state)
    assert all(decision.form.endswith("(is_causal)") for decision in attn.reports()[-1].decisions)
