"""Sliders that move a figure: live in a notebook, and in the static page without a kernel.

>>> explore(lambda window: mask_plot(sliding(64, window), title=f"window {window}"),
...         alt="A band of width `window` below the diagonal.", window=[4, 8, 16])

Every combination of slider values is drawn once. The page carries the frames and a few lines of
JavaScript, the notebook shows ipywidgets over the same frames.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from .display import display_bundle, has_kernel
from .style import missing_labels, paper, png_bytes

MOST_FRAMES = 24
FRAME_DPI, FRAME_COLOURS = 110, 128

# Runs once for every copy of the explorer in the page. Frame 0 is the image that is there.
SCRIPT = """
(() => { for (const box of document.querySelectorAll("#ID:not([data-ready])")) {
  box.dataset.ready = "1";
  const image = box.querySelector("img"), inputs = [...box.querySelectorAll("input")];
  const data = JSON.parse(box.querySelector("script[type='application/json']").textContent);
  const first = image.getAttribute("src"), alt = image.alt;
  const turn = () => {
    let frame = 0;
    const chosen = data.sliders.map((slider, i) => {
      const at = +inputs[i].value, value = slider.values[at];
      frame = frame * slider.values.length + at;
      inputs[i].setAttribute("aria-valuetext", value);
      inputs[i].parentElement.querySelector("output").textContent = value;
      return slider.label + " = " + value;
    });
    image.src = frame ? "data:image/png;base64," + data.frames[frame] : first;
    image.alt = alt + " (" + chosen.join(", ") + ")";
  };
  for (const input of inputs) input.addEventListener("input", turn);
  turn();
} })();
"""

BOX = "max-width:100%;margin:0.5rem 0;font-family:inherit"
ROW = "display:flex;flex-wrap:wrap;align-items:center;gap:0.3rem 0.7rem;margin:0.35rem 0"
INPUT = "flex:1 1 9rem;min-width:6rem;max-width:24rem;height:1.6rem;cursor:pointer"
IMAGE = "display:block;max-width:100%;height:auto;border-radius:4px"


def explore(
    fn: Callable[..., Figure], *, alt: str, title: str | None = None, **sliders: Sequence[Any]
) -> None:
    """Display ``fn(**values) -> figure`` with a slider for every keyword.

    Args:
        fn: draws one frame; its figures carry a title and labelled axes.
        alt: what the figure shows, for those who do not see it.
        title: a caption above the sliders.
        sliders: name -> the values that it takes, at most 24 combinations in all.

    Raises:
        ValueError: no alternative text, no slider or an empty one, too many combinations, or a
            figure without title or labels.
        TypeError: ``fn`` returns no figure.
    """
    display_bundle(Explorer(fn, alt=alt, title=title, **sliders).bundle())


class Explorer:
    """The frames of `explore` and their renderings; arguments and errors are the same."""

    def __init__(
        self,
        fn: Callable[..., Figure],
        *,
        alt: str,
        title: str | None = None,
        **sliders: Sequence[Any],
    ):
        if not isinstance(alt, str) or not alt.strip():
            raise ValueError("explore needs alt: a sentence on what the figure shows")
        self.alt, self.title = " ".join(alt.split()), title
        self.sliders = {name: _values(name, values) for name, values in sliders.items()}
        _check_count(self.sliders)
        self.frames = [self._frame(fn, values) for values in itertools.product(*self.values)]

    @property
    def values(self) -> list[list]:
        return list(self.sliders.values())

    def _frame(self, fn: Callable[..., Figure], values: tuple) -> bytes:
        chosen = dict(zip(self.sliders, values, strict=True))
        with paper():
            figure = getattr(fn(**chosen), "figure", None)  # of axes as well
        if not isinstance(figure, Figure):
            raise TypeError(f"explore: fn must return a matplotlib figure, for {chosen} it did not")
        missing = missing_labels(figure)
        if missing:
            raise ValueError(f"explore: the figure for {chosen} lacks {' and '.join(missing)}")
        return png_bytes(figure, FRAME_DPI, FRAME_COLOURS)

    def index(self, **values: Any) -> int:
        """The number of the frame for these slider values."""
        frame = 0
        for name, allowed in self.sliders.items():
            frame = frame * len(allowed) + allowed.index(values[name])
        return frame

    def summary(self) -> str:
        """The plain text: stable from run to run."""
        moving = [f"{_label(n)} {_text(v[0])} … {_text(v[-1])}" for n, v in self.sliders.items()]
        heading = f"{self.title}: " if self.title else ""
        return f"{heading}{self.alt} [sliders: {'; '.join(moving)}]"

    def html(self) -> str:
        """The page's version: works without a kernel, a network or a library."""
        name = "explore-" + hashlib.sha256(b"".join(self.frames)).hexdigest()[:12]
        encoded = [base64.b64encode(frame).decode() for frame in self.frames]
        data = {
            "sliders": [
                {"label": _label(n), "values": [_text(v) for v in values]}
                for n, values in self.sliders.items()
            ],
            "frames": ["", *encoded[1:]],
        }
        rows = "".join(_slider_row(f"{name}-{i}", s) for i, s in enumerate(data["sliders"]))
        legend = f"<strong>{html.escape(self.title)}</strong>" if self.title else ""
        return (
            f'<div class="explore" id="{name}" role="group" style="{BOX}" '
            f'aria-label="{html.escape(self.title or "Figure with sliders")}">{legend}{rows}'
            f'<img class="dark-light" style="{IMAGE}" alt="{html.escape(self.alt)}" '
            f'src="data:image/png;base64,{encoded[0]}">'
            f'<script type="application/json">{_json(data)}</script>'
            f"<script>{SCRIPT.replace('ID', name).strip()}</script></div>"
        )

    def widget(self) -> Any:
        """The notebook's version: a box of ipywidgets that switches frames."""
        import ipywidgets

        image = ipywidgets.Image(
            value=self.frames[0],
            format="png",
            layout=ipywidgets.Layout(align_self="flex-start", max_width="100%"),
        )
        controls = [
            ipywidgets.SelectionSlider(
                options=[(_text(value), i) for i, value in enumerate(values)],
                value=0,
                description=_label(name),
                style={"description_width": "initial"},
                layout=ipywidgets.Layout(width="24rem", max_width="100%"),
            )
            for name, values in self.sliders.items()
        ]

        def turn(_change: Any) -> None:
            frame = 0
            for control in controls:
                frame = frame * len(control.options) + control.value
            image.value = self.frames[frame]

        for control in controls:
            control.observe(turn, names="value")
        heading = [ipywidgets.Label(self.title)] if self.title else []
        return ipywidgets.VBox([*heading, *controls, image])

    def bundle(self) -> dict[str, Any]:
        """What is displayed: HTML, plain text and, where a kernel can serve it, the widget."""
        bundle: dict[str, Any] = {"text/html": self.html(), "text/plain": self.summary()}
        if has_kernel():
            view: Mapping[str, Any] = self.widget()._repr_mimebundle_()
            bundle |= {mime: part for mime, part in view.items() if mime != "text/plain"}
        return bundle


def _slider_row(name: str, slider: dict) -> str:
    label, last = html.escape(slider["label"]), len(slider["values"]) - 1
    first = html.escape(slider["values"][0])
    return (
        f'<div style="{ROW}"><label for="{name}">{label}</label>'
        f'<input id="{name}" type="range" min="0" max="{last}" step="1" value="0" '
        f'autocomplete="off" aria-valuetext="{first}" style="{INPUT}">'
        f'<output for="{name}" aria-hidden="true" style="min-width:3.5em">{first}</output></div>'
    )


def _values(name: str, values: Any) -> list:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise ValueError(f"slider {name!r} must be a sequence of values, got {values!r}")
    values = [value.item() if hasattr(value, "item") else value for value in values]
    if not values:
        raise ValueError(f"slider {name!r} has no values")
    return values


def _check_count(sliders: dict[str, list]) -> None:
    if not sliders:
        raise ValueError("explore needs at least one slider: a keyword with a sequence of values")
    count = math.prod(map(len, sliders.values()))
    if count > MOST_FRAMES:
        sizes = " × ".join(f"{len(values)} ({name})" for name, values in sliders.items())
        raise ValueError(
            f"explore draws every combination: {sizes} = {count} frames, at most {MOST_FRAMES}. "
            "Give the sliders fewer values, or make two explorers"
        )


def _label(name: str) -> str:
    return name.strip("_").replace("_", " ")


def _text(value: Any) -> str:
    """``1,024``, ``0.125``, ``yes``."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json(data: dict) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
