"""The look of all figures."""

from typing import Any

INK, PALE, FAINT = "#24292f", "#6e7781", "#d8dee4"


def titled(title: str, note: str, size: tuple[float, float], above: float = 0) -> Any:
    """An empty figure of this size in inches, with a title above and a note of two lines below.

    `above` inches below the title stay free.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    below = 0.45 / size[1]
    layout = ConstrainedLayoutEngine(
        w_pad=0.14, h_pad=0.12, rect=(0, below, 1, 1 - below - (0.4 + above) / size[1])
    )
    figure = Figure(figsize=size, dpi=160, layout=layout)
    figure.suptitle(
        title,
        x=0.012,
        y=1 - 0.1 / size[1],
        va="top",
        ha="left",
        fontsize=13,
        fontweight="bold",
        color=INK,
    )
    figure.text(0.012, 0.1 / size[1], note, ha="left", va="bottom", fontsize=8.5, color=PALE)
    return figure


def frame(axes: Any, title: str, unit: str, size: float = 12) -> None:
    """Set the title, the unit of the y axis, and horizontal grid lines."""
    axes.set_title(title, loc="left", fontsize=size, fontweight="bold", color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(which="both", length=0, colors=INK, labelsize=9)
