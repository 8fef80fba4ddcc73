"""Accuracy of the variants of an ablation: a dot for each seed, a bar for their mean."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from irpe_ds.plots.style import INK, PALE, frame, plain, titled

COLOUR = "#0072B2"


def draw_ablation(title: str, variants: Mapping[str, Sequence[float]], note: str) -> Any:
    """A figure of top-1 accuracies in %, by variant; one per seed."""
    figure = titled(title, note, (1.8 + 1.15 * len(variants), 4.0))
    axes = figure.subplots()
    frame(axes, "Top-1 accuracy after the last epoch", "% of images")
    for place, values in enumerate(variants.values()):
        mean, deviation = fmean(values), stdev(values) if len(values) > 1 else 0.0
        axes.bar(place, 2 * deviation, 0.5, mean - deviation, color=COLOUR, alpha=0.15)
        axes.plot([place - 0.25, place + 0.25], [mean, mean], color=COLOUR, linewidth=2)
        spread = [place + 0.3 * (n / max(1, len(values) - 1) - 0.5) for n in range(len(values))]
        axes.plot(spread, values, "o", color=INK, markersize=3.5, alpha=0.8)
        axes.annotate(
            f"{mean:.2f}\n± {deviation:.2f}",
            (place, max(*values, mean + deviation)),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=PALE,
        )
    axes.set_xticks(range(len(variants)), [plain(name) for name in variants])
    axes.margins(y=0.18)
    return figure
