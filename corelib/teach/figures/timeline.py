"""Who works when: schedules as Gantt charts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..style import CYCLE, HATCHES, INK, MUTED, PAPER, axes_or_new, paper

MOST_IN_LEGEND = 10


def timeline(
    tasks: Sequence[tuple],
    *,
    title: str,
    xlabel: str = "time (tiles)",
    ylabel: str = "program",
    lanes: Sequence[Any] | None = None,
    legend: str | None = None,
    ax: Any = None,
) -> Figure:
    """Tasks ``(lane, start, end, key)``, or with a text to write inside as a fifth entry.

    Tasks of one ``key`` share a colour and hatch. A dashed line marks the end of the last task.

    Args:
        tasks: what ran where, from when to when.
        title: what is shown.
        xlabel: of the time axis, with its unit.
        ylabel: what a lane is.
        lanes: all lanes from top to bottom, idle ones too; by default those with tasks, sorted
            when they are numbers.
        legend: title of the legend that names the keys; None leaves the legend out.
        ax: axes to draw into.

    Raises:
        ValueError: no task, a task that ends before it starts, or in an unknown lane.
    """
    tasks = [(*task, "")[:5] if len(task) == 4 else tuple(task) for task in tasks]
    lanes = _lanes(tasks, lanes)
    keys = list(dict.fromkeys(task[3] for task in tasks))
    looks = {key: _look(i) for i, key in enumerate(keys)}
    end = max(task[2] for task in tasks)
    with paper():
        ax = axes_or_new(ax, (6.4, min(6.0, 1.5 + 0.3 * len(lanes))))
        for lane, start, stop, key, text in tasks:
            row = lanes.index(lane)
            ax.barh(row, stop - start, left=start, height=0.78, edgecolor=PAPER, **looks[key])
            if text != "":
                middle = (start + stop) / 2
                ax.text(
                    middle,
                    row,
                    str(text),
                    ha="center",
                    va="center",
                    fontsize=9,
                    color=INK,
                    bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
                )
        ax.axvline(end, color=INK, linestyle="--", linewidth=1.1)
        ax.set_yticks(range(len(lanes)), [str(lane) for lane in lanes])
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(len(lanes) - 0.4, -0.6))
        ax.set_xlim(min(0, min(task[1] for task in tasks)), end * 1.02)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x")
        if len(lanes) > 24:
            ax.set_yticks(range(0, len(lanes), 8), [str(lane) for lane in lanes[::8]])
        if legend is not None:
            _legend(ax, looks, legend)
    return ax.figure


def _lanes(tasks: Sequence[tuple], lanes: Sequence[Any] | None) -> list:
    if not tasks:
        raise ValueError("timeline needs at least one task")
    used = list(dict.fromkeys(task[0] for task in tasks))
    if lanes is None:
        lanes = sorted(used) if all(isinstance(lane, (int, float)) for lane in used) else used
    for lane, start, stop, *_ in tasks:
        if lane not in lanes:
            raise ValueError(f"task in lane {lane!r}, but the lanes are {list(lanes)}")
        if stop < start:
            raise ValueError(f"task in lane {lane!r} ends at {stop}, before it starts at {start}")
    return list(lanes)


def _look(i: int) -> dict[str, str]:
    """Colour first, then hatch: distinct for 64 keys."""
    return {"facecolor": CYCLE[i % len(CYCLE)], "hatch": HATCHES[i // len(CYCLE) % len(HATCHES)]}


def _legend(ax: Any, looks: dict, title: str) -> None:
    shown = list(looks.items())[:MOST_IN_LEGEND]
    patches = [Patch(edgecolor=PAPER, **look) for _, look in shown]
    names = [str(key) for key, _ in shown]
    if len(looks) > len(shown):
        patches.append(Patch(facecolor="none", edgecolor="none"))
        names.append(f"… {len(looks) - len(shown)} more")
    box = ax.legend(
        patches,
        names,
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0,
        handlelength=1.2,
        handleheight=1.0,
        alignment="left",
    )
    box.get_title().set_color(MUTED)
