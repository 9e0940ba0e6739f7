"""How far a training has come, as a file: written whole or not at all, so that it may be broken off at any time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from attn_compiler.errors import PolicyError
from attn_compiler.whole_file import whole_file

Settings = Mapping[str, str | int | float]  # of a training, which goes on under the same ones only
Learned = Mapping[str, nn.Parameter]


@dataclass
class Progress:
    """The steps that are done, the loss of each attention at every one of them, and the settings of the training."""

    settings: Settings
    step: int = 0
    curve: dict[str, list[float]] = field(default_factory=dict)

    def write(self, path: Path, learned: Learned, optimizer: torch.optim.Optimizer) -> None:
        """Write all that going on takes."""
        held = {
            "settings": dict(self.settings),
            "step": self.step,
            "curve": self.curve,
            "learned": {name: value.detach() for name, value in learned.items()},
            "optimizer": optimizer.state_dict(),
        }
        with whole_file(path) as file:
            torch.save(held, file)


def read_progress(path: Path, settings: Settings, learned: Learned, optimizer: torch.optim.Optimizer) -> Progress:
    """Go on where a file says that training was: fills parameters and optimizer. Without a file, from the beginning."""
    if not path.is_file():
        return Progress(settings)
    held = _read(path)
    shapes, wanted = _shapes(held["learned"]), _shapes(learned)
    if shapes != wanted:
        raise PolicyError(f"{path} is the training of other parameters, {shapes}, where this model has {wanted}: remove it")
    before = held.get("settings", {})
    other = next((name for name, x in settings.items() if before.get(name) != x), None)
    if other:
        raise PolicyError(
            f"{path} is a training whose {other} is {before.get(other, 'not known')}, where this one has {settings[other]}: "
            "ask for the same, or remove it"
        )
    with torch.no_grad():
        for name, value in learned.items():
            value.copy_(held["learned"][name])
    optimizer.load_state_dict(held["optimizer"])
    return Progress(settings, held["step"], held["curve"])


def _read(path: Path) -> dict[str, Any]:
    try:
        held = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise PolicyError(f"{path} is no training that could go on ({reason}): remove it") from error
    if not isinstance(held, dict) or not {"learned", "optimizer", "step", "curve"} <= held.keys():
        raise PolicyError(f"{path} is no training that could go on: remove it")
    return held


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}
