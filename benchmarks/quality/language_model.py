"""A small language model of bytes, trained from scratch on the sources of Python's standard library."""

from __future__ import annotations

import copy
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS, HEADS, WIDTH, CONTEXT = 2, 4, 128, 256


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("moved", torch.zeros(HEADS, 1, WIDTH // HEADS))  # added to keys, which changes no softmax

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k + self.moved, v, is_causal=True)
        return self.out(attended.transpose(1, 2).reshape(batch, tokens, WIDTH))

    def move(self, projected: Tensor, channels: int, deviations: float) -> None:
        """Have some channels of the keys lie so many of their standard deviations away from zero."""
        keys = projected.unflatten(-1, (3, HEADS, -1))[..., 1, :, :]
        self.moved[:, 0, :channels] = deviations * keys.std(dim=(0, 1))[:, :channels]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.perceptron(self.between(x))


class LanguageModel(nn.Module):
    """Logits of the next byte, [batch, tokens, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.places(torch.arange(text.shape[1], device=text.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def texts() -> tuple[Tensor, Tensor]:
    """What is learned from, and what is held out: every tenth file."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    read = [file.read_bytes() for file in files]
    kept = b"".join(text for number, text in enumerate(read) if number % 10)
    held_out = b"".join(read[::10])
    return tuple(torch.frombuffer(bytearray(text), dtype=torch.uint8).long() for text in (kept, held_out))  # type: ignore[return-value]


def batches(text: Tensor, rows: int, seed: int, length: int = CONTEXT) -> Iterator[Tensor]:
    """Rows of text from random places, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(text) - length, (rows, 1), generator=generator)
        yield text[starts + torch.arange(length)]


def loss_of(logits: Tensor, text: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())


def kept(folder: Path, seed: int, text: Tensor, steps: int, rows: int) -> tuple[LanguageModel, list[float]]:
    """The trained model that `folder` holds, and its losses; trained, and put there, if it holds none."""
    path = folder / f"language-{seed}-{steps}-{rows}.pt"
    if not path.is_file():
        model, losses = trained(seed, text, steps, rows)
        torch.save({"model": model.state_dict(), "losses": losses}, path)
    held, model = torch.load(path, weights_only=True), LanguageModel()
    model.load_state_dict(held["model"])
    return model.eval(), held["losses"]


def with_outliers(model: LanguageModel, text: Tensor, channels: int, deviations: float) -> LanguageModel:
    """The same model, computing the same, with so many channels of each head's keys far away from zero."""
    moved, seen = copy.deepcopy(model), next(batches(text, 8, seed=1))
    inside = [layer.attention for layer in moved.layers]

    def move(attention: Attention) -> Callable[..., None]:
        return lambda _, __, projected: attention.move(projected, channels, deviations)

    hooks = [attention.qkv.register_forward_hook(move(attention)) for attention in inside]
    with torch.no_grad():
        moved(seen)
    for hook in hooks:
        hook.remove()
    return moved


def trained(seed: int, text: Tensor, steps: int, rows: int, rate: float = 3e-3) -> tuple[LanguageModel, list[float]]:
    """A model of its own seed, and its loss at every step."""
    torch.manual_seed(seed)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    for _, batch in zip(range(steps), batches(text, rows, seed), strict=False):
        optimizer.zero_grad()
        loss = loss_of(model(batch), batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), losses
