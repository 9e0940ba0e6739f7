"""The file that a policy calls `parameters:`: tensors by name, and how many steps somebody trained them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attn_compiler.errors import MissingPackageError, PolicyError
from attn_compiler.planning.sources import Array
from attn_compiler.whole_file import whole_file

STEPS = "attn.steps"  # in the file's metadata; files that others wrote do not say it, and count as trained


def write_parameters(path: Path, values: Mapping[str, Array], steps: int) -> None:
    """Write the file whole, or not at all."""
    if path.suffix != ".safetensors":
        raise PolicyError(f"{path.name}: parameters are written as .safetensors; let the policy's `parameters:` name such a file")
    packed = {name: np.ascontiguousarray(value) for name, value in values.items()}
    with whole_file(path) as file:
        _safetensors().numpy.save_file(packed, file, metadata={STEPS: str(steps)})


def steps_of(path: Path) -> int | None:
    """How many steps what stands in a file was trained; None where it does not say, or is no .safetensors file."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    with _safetensors().safe_open(path, framework="numpy") as file:
        said = (file.metadata() or {}).get(STEPS, "")
    return int(said) if said.isdecimal() else None


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise MissingPackageError('.safetensors files need a package: pip install "attn-compiler[safetensors]"') from error
    return safetensors
