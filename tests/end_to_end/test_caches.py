"""Inductor's and AOTAutograd's caches on disk: found again by another process, never met by another policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys, torch
import attn_compiler as attn
from torch._dynamo.utils import counters

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)
    def attend(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return (torch.softmax(q @ k.mT * 8**-0.5, dim=-1) @ v).transpose(1, 2).flatten(2)
    def forward(self, x):
        return self.attend(x)

class Checkpointed(Block):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.attend, x, use_reentrant=False)

runs = json.loads(sys.argv[1])
if any(run.get("words") for run in runs):
    attn.library.add(runs[0]["words"])
found = []
for run in runs:
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()
    torch.set_grad_enabled(bool(run.get("checkpointed")))
    model, x = (Checkpointed if run.get("checkpointed") else Block)(), torch.randn(2, run.get("tokens", 16), 16)
    options = {"policy": run["policy"]}
    if "cut" in run:
        documents = (torch.arange(16) >= run["cut"]).long()
        options["tables"] = attn.Tables(documents=documents.expand(2, -1).clone() if run.get("rows") else documents)
    out = torch.compile(model, backend="attn", options=options)(x)
    if run.get("checkpointed"):
        out.sum().backward()
    wanted = "cpp" if "tokens" in run else "torch"
    assert attn.reports()[-1].decisions[0].target == wanted, str(attn.reports()[-1])
    hits = {name: counters[group][name] for group, name in
            (("inductor", "fxgraph_cache_hit"), ("aot_autograd", "autograd_cache_hit"), ("aot_autograd", "autograd_cache_miss"),
             ("aot_autograd", "autograd_cache_bypass"))}
    found.append({"sum": out.double().square().sum().item(), **hits})
print(json.dumps(found))
"""


def run(folder: Path, *runs: dict[str, object]) -> list[dict[str, float]]:
    """Compile and run in a process of its own, with its caches in `folder`."""
    place = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(runs)],
        env={**os.environ, **place},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, list)
    return found


WORD = '''"""Keys nearby."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, k, q


def nearby() -> Expr:
    """|q - k| < {size}."""
    return abs(q - k) < {size}
'''


def masked(mask: str, **more: object) -> dict[str, object]:
    return {"version": 1, **more, "rules": [{"match": {}, "attn": {"mask": mask}}]}


def by_documents(**source: object) -> dict[str, object]:
    return masked("same(document)", labels={"document": source})


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_second_process_finds_what_the_first_compiled(checkpointed: bool, tmp_path: Path) -> None:
    asked = {"policy": masked("window(4)"), "checkpointed": checkpointed}
    other = {"policy": masked("window(2)"), "checkpointed": checkpointed}
    [first] = run(tmp_path, asked)
    again, changed = run(tmp_path, asked, other)
    assert first["autograd_cache_bypass"] == 0
    assert first["autograd_cache_miss"] == 1
    assert again["autograd_cache_hit"] == 1
    assert again["fxgraph_cache_hit"] >= 1
    assert again["sum"] == first["sum"]
    assert changed["autograd_cache_hit"] == 0
    assert changed["sum"] != first["sum"]


def test_generated_kernels_are_found_again_too(tmp_path: Path) -> None:
    asked, other = {"policy": masked("window(4)"), "tokens": 48}, {"policy": masked("window(2)"), "tokens": 48}
    [first] = run(tmp_path, asked)
    again, changed = run(tmp_path, asked, other)
    assert first["autograd_cache_bypass"] == 0
    assert again["autograd_cache_hit"] == 1
    assert again["sum"] == first["sum"]
    assert changed["autograd_cache_hit"] == 0
    assert changed["sum"] != first["sum"]


def test_tables_are_no_part_of_what_is_compiled_but_their_shapes_are(tmp_path: Path) -> None:
    given = by_documents(given="documents")
    first, same, shaped = run(
        tmp_path, {"policy": given, "cut": 4}, {"policy": given, "cut": 9}, {"policy": given, "cut": 4, "rows": True}
    )
    assert same["autograd_cache_hit"] == 1
    assert same["sum"] != first["sum"]
    assert shaped["autograd_cache_hit"] == 0
    assert abs(shaped["sum"] - first["sum"]) < 1e-4 * first["sum"]


def test_values_of_a_file_are_read_when_compiling(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(
        "version: 1\nlabels: {document: {file: ids.json}}\nrules: [{match: {}, attn: {mask: same(document)}}]\n"
    )
    (tmp_path / "ids.json").write_text(json.dumps([0] * 5 + [1] * 11))
    asked = {"policy": str(tmp_path / "policy.yaml")}
    [first] = run(tmp_path, asked)
    (tmp_path / "ids.json").write_text(json.dumps([0] * 9 + [1] * 7))
    [second] = run(tmp_path, asked)
    assert first["sum"] != second["sum"]


def test_a_word_that_changes_is_compiled_anew(tmp_path: Path) -> None:
    word = tmp_path / "words" / "masks" / "nearby.py"
    word.parent.mkdir(parents=True)
    asked = {"policy": masked("nearby"), "words": str(word.parents[1])}
    sums = []
    for size in (4, 2):
        word.write_text(WORD.format(size=size))
        [found] = run(tmp_path, asked)
        assert found["autograd_cache_hit"] == 0
        sums.append(found["sum"])
    assert sums[0] != sums[1]
