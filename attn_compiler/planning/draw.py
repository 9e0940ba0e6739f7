"""Draws a schedule as a picture, one panel per group of heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attn_compiler.algebra.notation import notation
from attn_compiler.errors import MissingPackageError, PictureError, did_you_mean
from attn_compiler.planning.raster import raster

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from attn_compiler.planning.schedule import Panel, Schedule

_MOST_CELLS = 512
_COLORS = {"empty": "#f4f1ea", "mixed": "#f2a65a", "full": "#1f4e79"}
_LONGEST_TITLE = 64
_MOST_COLUMNS = 4


def draw(schedule: Schedule, path: str | Path) -> None:
    """Write the picture; the ending of `path` says in which format."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as missing:
        raise MissingPackageError("drawing needs matplotlib: pip install 'attn-compiler[viz]'") from missing
    columns = min(len(schedule.panels), _MOST_COLUMNS)
    rows = -(-len(schedule.panels) // columns)
    size = (5.2 * columns + 0.4, (5.2 * _aspect(schedule) + 0.6) * rows + 0.9)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    for place, panel in enumerate(schedule.panels):
        _panel(figure.add_subplot(rows, columns, place + 1), schedule, panel)
    figure.suptitle(_shortened(notation(schedule.variant.mask)), fontsize=13)
    handles = [Patch(facecolor=color, edgecolor="#999999", label=name) for name, color in _COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    known = figure.canvas.get_supported_filetypes()
    ending = Path(path).suffix.removeprefix(".").lower()
    if ending not in known:
        raise PictureError(f'a picture cannot be written to {path}: no format is called ".{ending}"{did_you_mean(ending, known)}')
    figure.savefig(path, dpi=160)


def _panel(axis: Axes, schedule: Schedule, panel: Panel) -> None:
    from matplotlib.colors import ListedColormap

    cells = raster(panel.runs, _MOST_CELLS, _MOST_CELLS)
    tall, wide = schedule.tile
    extent = (0, panel.runs.columns * wide, panel.runs.rows * tall, 0)
    if cells.size:
        colors = ListedColormap(list(_COLORS.values()))
        axis.imshow(cells, cmap=colors, vmin=0, vmax=2, extent=extent, interpolation="nearest", aspect="auto")
    axis.set_xlim(0, max(schedule.k_len, 1))
    axis.set_ylim(max(schedule.q_len, 1), 0)
    axis.set_box_aspect(_aspect(schedule))
    if max(cells.shape) <= 64:
        _grid(axis, schedule)
    axis.set_xlabel("key")
    axis.set_ylabel("query")
    whose = f"{_heads(panel)} · " if schedule.heads > 1 else ""
    axis.set_title(f"{whose}density {schedule.panel_density(panel):.1%} · tiles {tall} × {wide}", fontsize=10)
    axis.spines[:].set_color("#999999")
    axis.tick_params(color="#999999", labelsize=8)


def _grid(axis: Axes, schedule: Schedule) -> None:
    tall, wide = schedule.tile
    axis.hlines(range(tall, schedule.q_len, tall), 0, schedule.k_len, color="white", linewidth=0.6)
    axis.vlines(range(wide, schedule.k_len, wide), 0, schedule.q_len, color="white", linewidth=0.6)


def _aspect(schedule: Schedule) -> float:
    """Height over width, within what can be read."""
    return min(max(schedule.q_len / max(schedule.k_len, 1), 0.15), 1.5)


def _heads(panel: Panel) -> str:
    members = panel.heads
    if len(members) == 1:
        return f"head {members[0]}"
    steady = members == tuple(range(members[0], members[-1] + 1))
    return f"heads {members[0]}–{members[-1]}" if steady else f"heads {_shortened(', '.join(map(str, members)), 24)}"


def _shortened(text: str, longest: int = _LONGEST_TITLE) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
