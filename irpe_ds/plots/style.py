"""The look of all figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irpe_ds.errors import ConfigError, printable

SHOWN = 200
"""Characters of a name that are drawn."""

FORMATS = (".png", ".pdf", ".svg")
"""What figures are written as, by the suffix of the file."""

INK, PALE, FAINT = "#24292f", "#6e7781", "#d8dee4"


def plain(text: str) -> str:
    """Text that matplotlib draws as it is, such as names from files: `$` would begin a formula."""
    text = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
    return printable(text).replace("$", r"\$")


def check_out(paths: Sequence[Path]) -> Sequence[Path]:
    """The files of a script's --out; raises ConfigError for one of another format."""
    for path in paths:
        if path.suffix not in FORMATS:
            raise ConfigError("--out", f"a name that ends in {', '.join(FORMATS)}", path)
    return paths


def write_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format that the path's suffix names; raises OSError.

    Text of a vector figure stays text, which editors and journals ask for.
    """
    from matplotlib import rc_context

    with rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):
        figure.savefig(path)


def pixels(figure: Any) -> Any:
    """A figure as an array (H, W, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from numpy import asarray

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return asarray(canvas.buffer_rgba())[..., :3].copy()


def save_figure(figure: Any, paths: Sequence[Path]) -> None:
    """Write a figure to the files of a script's --out, and print their names.

    Raises:
        ConfigError: a file cannot be written.
    """
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_figure(figure, path)
        except OSError as error:
            raise ConfigError(f"cannot write --out: {error}") from None
        print(path)


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
        plain(title),
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
    axes.set_title(plain(title), loc="left", fontsize=size, fontweight="bold", color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(which="both", length=0, colors=INK, labelsize=9)
