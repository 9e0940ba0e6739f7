"""`attn.export_pt2`: compiled files that run in a process which has never heard of us."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler import torch_private as private
from attn_compiler.errors import ExportError
from attn_compiler.export.metadata import labels
from attn_compiler.testing import assert_all_within_budget
from end_to_end.by_hand import policy, with_weights
from end_to_end.models import double, like_llama, llama, near, tokens

WINDOW = policy("causal & window(8)")
SIZES = ((2, 96), (3, 300), (1, 33), (2, 5))
ALONE = """
import pathlib, sys, torch
folder = pathlib.Path(sys.argv[1])
run = torch._inductor.aoti_load_package(str(folder / "one.pt2"))
for at, given in enumerate(torch.load(folder / "given.pt")):
    torch.save(run(*given), folder / f"found{at}.pt")
assert not [name for name in sys.modules if name.split(".")[0] in ("attn_compiler", "transformers")]
"""


def alone(folder: Path, given: list[tuple[Tensor, ...]]) -> list[object]:
    """What `one.pt2` gives in a process of its own, where only torch is imported."""
    torch.save(given, folder / "given.pt")
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", ALONE, str(folder)], check=True, cwd=folder)
    return [torch.load(folder / f"found{at}.pt") for at in range(len(given))]


class Attention(nn.Module):
    """Nothing but an attention, whose result has a class of its own."""

    def forward(self, x: Tensor) -> OrderedDict[str, object]:
        out = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return OrderedDict(last=out, also=(out + 1, [out[0]]))


def test_a_window_runs_at_any_length_where_only_torch_is_imported(tmp_path: Path) -> None:
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    report = attn.export_pt2(
        Attention().eval(), (torch.randn(2, 2, 96, 8),), tmp_path / "one.pt2", WINDOW, dynamic_shapes=(sizes,)
    )
    assert [decision.form for decision in report.report.decisions] == ["blocks of queries, each with the keys in reach"]
    assert [check.by for check in report.checks] == ["AOTInductor"] * 2
    (label,) = labels(tmp_path / "one.pt2")
    assert (label.outcome, label.strategy) == ("approximate", report.report.decisions[0].form)
    given = [torch.randn(rows, 2, length, 8) for rows, length in SIZES]
    for x, found in zip(given, alone(tmp_path, [(x,) for x in given]), strict=True):
        assert isinstance(found, dict)
        attend, seen = nn.functional.scaled_dot_product_attention, near(x.shape[2], 8, causal=True)
        exact, plain = (attend(y, y, y, attn_mask=seen) for y in (x.double(), x))
        last, (plus_one, (first,)) = found["last"], found["also"]
        assert_all_within_budget([last, plus_one, first], [exact, exact + 1, exact[0]], lambda p=plain: [p, p + 1, p[0]])


@pytest.mark.full
def test_a_llama_runs_where_only_torch_is_imported(tmp_path: Path) -> None:
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    model = with_weights(llama())
    attn.export_pt2(model, (tokens(2, 96),), tmp_path / "one.pt2", WINDOW, dynamic_shapes={"input_ids": sizes})
    given = [tokens(rows, length) for rows, length in SIZES if length <= 128]
    for ids, found in zip(given, alone(tmp_path, [(ids,) for ids in given]), strict=True):
        by_hand = like_llama(ids, window=8)
        assert isinstance(found, dict)
        with torch.no_grad():
            exact = by_hand(double(model))
            assert_all_within_budget([found["last_hidden_state"]], [exact], lambda run=by_hand: [run(model)])


class Insisting(nn.Module):
    """A model that names one of our kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Named()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Named(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return attn.attend(x, x, x, "causal & window(8)", target="cpp")


def test_a_check_can_be_left_out_and_what_is_no_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "load_package", lambda path: None)
    with zipfile.ZipFile(tmp_path / "theirs.pt2", "w") as archive:
        archive.writestr("model/data/one_metadata.json", "{}")
    assert labels(tmp_path / "theirs.pt2") == ()
    monkeypatch.setattr(private, "compile_package", lambda program, path, says: path.write_text("no archive"))
    report = attn.export_pt2(nn.Sigmoid().eval(), (torch.randn(3),), tmp_path / "one.pt2", check=False)
    assert "not compared with the rewritten model" in str(report)
    with pytest.raises(ExportError, match="no package of AOTInductor"):
        labels(tmp_path / "one.pt2")


def test_an_operator_of_ours_is_an_error_that_says_where_it_stands(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"inner calls attn_compiler\.\S+, an operator of ours"):
        attn.export_pt2(Insisting().eval(), (torch.randn(2, 2, 96, 8),), tmp_path / "one.pt2")
    assert not list(tmp_path.iterdir())


def test_a_file_that_torch_would_not_load_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"end in \.pt2"):
        attn.export_pt2(nn.ReLU().eval(), (torch.randn(3),), tmp_path / "one.so")


def test_a_result_that_differs_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "compile_package", lambda program, path, says: path.write_bytes(b""))
    monkeypatch.setattr(private, "load_package", lambda path: lambda x: x)
    with pytest.raises(ExportError, match="AOTInductor computes something else"):
        attn.export_pt2(nn.Sigmoid().eval(), (torch.randn(3),), tmp_path / "one.pt2")
    assert not list(tmp_path.iterdir())
