"""The generated kernels on ARM (NEON): cross-compiled, and run by an emulator, call by call."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_compiler.errors import ShapeError
from attn_compiler.runtime import decode, gradients, kernels, operator
from attn_compiler.runtime.compiler import FLAGS
from attn_compiler.targets.cpp.spec import Unit
from attn_compiler.testing import assert_case, random_case

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
DRIVER = Path(__file__).parents[1] / "fixtures" / "elsewhere.h"
NEON, WITH_PAIRS = "armv8-a", "armv8.6-a"
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(MISSING), reason=f"there is no {' and no '.join(MISSING)}")]


@dataclass(frozen=True)
class Arm:
    """A machine that is not there. It is handed copies of what a call points to, so it has to know how long these are."""

    room: Path
    architecture: str
    sizes: dict[int, int]  # of what stands at an address, in bytes

    def build(self, source: str, entry: str) -> Path:
        place = self.room / f"{len(list(self.room.iterdir()))}"
        place.mkdir()
        (place / "kernel.cpp").write_text(f'{source}\n#define ENTRY {entry}\n#include "{DRIVER}"\n')
        flags = [*FLAGS[: FLAGS.index("-fPIC")], f"-march={self.architecture}", "-static", "kernel.cpp", "-o", "kernel"]
        flags.remove("-march=native")
        subprocess.run([COMPILER, *flags], cwd=place, check=True)
        return place / "kernel"

    def call(self, kernel: Path, words: Iterable[int]) -> None:
        words = list(words)
        addresses = sorted(self.sizes.keys() & set(words))
        content = [len(addresses).to_bytes(8, "little")]
        for address in addresses:
            content += [self.sizes[address].to_bytes(8, "little"), ctypes.string_at(address, self.sizes[address])]
        numbers = [n for word in words for n in (addresses.index(word) if word in self.sizes else -1, word)]
        content.append(np.array([len(words), *numbers], np.int64).tobytes())
        file = kernel.parent / "call"
        file.write_bytes(b"".join(content))
        subprocess.run([EMULATOR, "-cpu", "max", str(kernel), str(file)], check=True)
        left = memoryview(file.read_bytes())[8:]
        for address in addresses:
            size = self.sizes[address]
            ctypes.memmove(address, left[8 : 8 + size].tobytes(), size)
            left = left[8 + size :]


class Library:
    """Looks like a shared object of ctypes, with one entry."""

    def __init__(self, arm: Arm, source: str) -> None:
        self.arm, self.source = arm, source
        self.lanes = partial(int, 4)

    def __getitem__(self, entry: str) -> partial[Path]:
        return partial(Path, self.arm.build(self.source, entry))

    @property
    def decode(self) -> partial[Path]:
        return self["decode"]


@pytest.fixture
def arm(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Arm:
    """All kernels run there, and nothing that was loaded here serves."""
    machine = Arm(tmp_path, request.param, {})
    for module in (kernels, gradients, decode):
        monkeypatch.setattr(module, "load", partial(Library, machine))
        monkeypatch.setattr(module, "call", lambda kernel, words: machine.call(kernel(), words))
    for module in (kernels, gradients):
        monkeypatch.setattr(module, "launches", lru_cache(module.launches.__wrapped__))
    monkeypatch.setattr(operator, "_decoding", lru_cache(operator._decoding.__wrapped__))
    monkeypatch.setattr(kernels, "fastest", lambda _: Unit.PAIRS if request.param == WITH_PAIRS else Unit.FLOATS)
    _remember_sizes(machine.sizes, monkeypatch)
    return machine


def _remember_sizes(sizes: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Note the size of whatever an address is taken of."""
    address_of, words_of = Tensor.data_ptr, kernels.Visits.words

    def data_ptr(x: Tensor) -> int:
        address = address_of(x)
        if address:
            sizes[address] = x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()
        return address

    def words(visits: kernels.Visits) -> list[int]:
        for x in vars(visits).values():
            if isinstance(x, np.ndarray):
                sizes[x.ctypes.data] = x.nbytes
        return words_of(visits)

    class Array(array):  # type: ignore[type-arg]
        def buffer_info(self) -> tuple[int, int]:
            address, length = super().buffer_info()
            sizes[address] = length * self.itemsize
            return address, length

    monkeypatch.setattr(Tensor, "data_ptr", data_ptr)
    monkeypatch.setattr(kernels.Visits, "words", words)
    monkeypatch.setattr(decode, "array", Array)


@pytest.mark.parametrize("arm", [NEON, WITH_PAIRS], indirect=True)
@pytest.mark.parametrize("seed", [0, 2, 3, 4, 8, 9, 11, 12, 22])
def test_kernels_are_right_on_arm(arm: Arm, seed: int) -> None:
    with torch.no_grad():
        _check(arm, seed)


@pytest.mark.parametrize("arm", [NEON, WITH_PAIRS], indirect=True)
@pytest.mark.parametrize("seed", [0, 2, 3, 8])
def test_gradients_are_right_on_arm(arm: Arm, seed: int) -> None:
    _check(arm, seed)


@pytest.mark.parametrize("arm", [NEON, WITH_PAIRS], indirect=True)
@pytest.mark.parametrize("seed", [0, 2, 4])
def test_few_queries_are_right_on_arm(arm: Arm, seed: int) -> None:
    with torch.no_grad():
        _check(arm, seed, queries=3)


def _check(arm: Arm, seed: int, queries: int | None = None) -> None:
    case = random_case(seed)
    dtype = torch.bfloat16 if arm.architecture == WITH_PAIRS else (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    try:
        assert_case(case if queries is None else case.last(queries), dtype, "cpp")
    except ShapeError as refused:
        pytest.skip(str(refused))
    assert any(arm.room.iterdir())
