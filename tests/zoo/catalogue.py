"""Every model of the zoo by its name."""

from __future__ import annotations

from zoo import audio, diffusion, handwritten, masks, multimodal, negatives, text, torch_modules, vision
from zoo.entry import Entry

FAMILIES = {
    "text": text.ENTRIES,
    "vision": vision.ENTRIES,
    "audio": audio.ENTRIES,
    "multimodal": multimodal.ENTRIES,
    "diffusion": diffusion.ENTRIES,
    "torch_modules": torch_modules.ENTRIES,
    "handwritten": handwritten.ENTRIES,
    "negatives": negatives.ENTRIES,
    "masks": masks.ENTRIES,
}

ZOO: dict[str, Entry] = {entry.name: entry for entries in FAMILIES.values() for entry in entries}
