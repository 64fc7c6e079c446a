"""One look for every figure: readable on light and dark pages, in print and without colour vision.

Figures have an opaque, light paper background, so that a dark page shows them as they are.
Series differ by colour *and* by line style and marker. Colours are those of Okabe and Ito
("Color universal design", 2008); ordered values go from paper to ink, signed ones from blue through
white to orange: both by lightness as well.
Nothing here touches matplotlib's global settings.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

PAPER, INK, MUTED, GRID = "#fdfcf8", "#1f2430", "#6b7280", "#dcdad2"
BLUE, ORANGE, GREEN, VERMILLION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, YELLOW, GREY = "#a8508a", "#56b4e9", "#c9b400", "#8a8f98"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK, YELLOW)
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)), "-", "--")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "++++", "oo")

SEQUENTIAL = LinearSegmentedColormap.from_list(
    "paper_blue_ink", ["#f3f0e6", "#c9dfe9", "#8fc1de", "#3f93c6", BLUE, "#084a7c", "#0a2340"]
).with_extremes(bad="none")
DIVERGING = LinearSegmentedColormap.from_list(
    "blue_white_orange", ["#08457e", BLUE, "#9cc9e3", PAPER, "#f6cd88", "#d98200", "#8a4b00"]
).with_extremes(bad="none")

DPI = 140
COLOURS = 192  # of the palette: a third of the bytes, and no difference to see
SETTINGS = {
    "figure.facecolor": PAPER,
    "figure.dpi": 100,
    "savefig.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "axes.prop_cycle": cycler(color=CYCLE) + cycler(linestyle=DASHES),
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.title_fontsize": 9,
    "lines.linewidth": 1.9,
    "lines.markersize": 5.5,
    "patch.linewidth": 0.8,
    "hatch.linewidth": 0.6,
    "image.interpolation": "nearest",
    "svg.hashsalt": "corelib",
}


@contextlib.contextmanager
def paper() -> Iterator[None]:
    """Matplotlib draws in the lab's style inside this block, whatever its settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def canvas(rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (6.4, 3.4), **options):
    """A new figure of ``size`` inches and its axes, in the lab's style.

    ``options`` go to `matplotlib.figure.Figure.subplots` (``sharex``, ``width_ratios`` …). The
    figure is not registered with pyplot, so nothing has to be closed or shows twice.
    """
    with paper():
        figure = Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # inches of paper around
        return figure, figure.subplots(rows, columns, **options)


def axes_or_new(ax: Any, size: tuple[float, float]) -> Any:
    """``ax``, or the axes of a new figure of ``size``."""
    return canvas(size=size)[1] if ax is None else ax


def png_bytes(figure: Figure, dpi: int = DPI, colours: int = COLOURS) -> bytes:
    """The figure as a small PNG with a palette of ``colours``; equal figures, equal bytes."""
    from PIL import Image

    raw = io.BytesIO()
    with paper():
        figure.savefig(raw, format="png", dpi=dpi, metadata={"Software": None})
    image = Image.open(raw).convert("RGB")
    background = image.getpixel((0, 0))
    # Pillow's default method is larger and loses colours that cover little (the colour bar's).
    image = image.quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    palette, paper_index = image.getpalette(), image.getpixel((0, 0))
    palette[3 * paper_index : 3 * paper_index + 3] = background  # the same paper in every figure
    image.putpalette(palette)
    small = io.BytesIO()
    image.save(small, format="PNG", optimize=True)
    return small.getvalue()


def missing_labels(figure: Figure) -> list[str]:
    """What a reader would miss: a title, or the label of an axis that shows ticks."""
    panels = [ax for ax in figure.axes if ax.get_visible() and ax.axison]
    panels = [ax for ax in panels if not hasattr(ax, "_colorbar")]  # labelled by its mappable
    missing = []
    titles = [ax.get_title(loc) for ax in panels for loc in ("left", "center", "right")]
    if not any(titles) and not figure.get_suptitle():
        missing.append("a title")
    for name in ("x", "y"):
        labels = [getattr(ax, f"get_{name}label")() for ax in panels if _shows_ticks(ax, name)]
        if not all(labels) and not getattr(figure, f"get_sup{name}label")():
            missing.append(f"a label of the {name} axis")
    return missing


def _shows_ticks(ax: Any, name: str) -> bool:
    """Whether that axis has numbers of its own: inner panels of a shared axis have none, and
    ticks that are words speak for themselves."""
    axis = getattr(ax, f"{name}axis")
    if any(tick.get_text()[:1].isalpha() for tick in axis.get_majorticklabels()):
        return False
    return axis.get_visible() and any(
        tick.label1.get_visible() or tick.label2.get_visible() for tick in axis.get_major_ticks()
    )
