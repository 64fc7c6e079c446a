"""Figures: what they draw, what they refuse, and that they leave no trace."""

import base64
import io
import subprocess
import sys
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from corelib.measure import H100, Race, Sweep
from corelib.teach import figures as f
from corelib.teach.figures.show import bundle
from corelib.teach.style import CYCLE, DIVERGING, INK, PAPER, SEQUENTIAL, png_bytes

LENGTHS = (256, 512, 1024, 2048, 4096)
SWEEP = Sweep(
    LENGTHS, tuple(Race({"a": [n * 1e-6], "b": [n**2 * 1e-9]}, "a", "m") for n in LENGTHS)
)
WEIGHTS = torch.tensor([[1.0, 0.0], [0.25, 0.75]], dtype=torch.bfloat16)
ROWS = [
    {"kernel": "split._merge<x>", "target": "sm_80", "registers": "40–96", "spills": "0"},
    {"kernel": "split._forward", "target": "sm_90", "registers": "168", "spills": "8"},
]


def every_kind(ax=None):
    """One figure of each kind, by name."""
    tasks = [(0, 0, 2, "r0"), (1, 0, 1, "r0", "x"), (1, 1, 2, "r1")]
    return {
        "attention_map": lambda: f.attention_map(WEIGHTS, title="t", ax=ax),
        "mask_plot": lambda: f.mask_plot(torch.eye(4).bool(), title="t", block=2, ax=ax),
        "state_heatmap": lambda: f.state_heatmap(torch.eye(3), title="t", ax=ax),
        "timeline": lambda: f.timeline(tasks, title="t", legend="request", ax=ax),
        "race_plot": lambda: f.race_plot(SWEEP, title="t", ax=ax),
        "lines": lambda: f.lines([1, 2], {"y": [3, 4]}, title="t", xlabel="x", ylabel="y", ax=ax),
        "roofline_plot": lambda: f.roofline_plot(
            H100, {"a": (1e9, 1e6), "b": (1e9, 1e9, 1e-3)}, title="t", ax=ax
        ),
        "bars": lambda: f.bars({"a": 1, "b": 2}, title="t", xlabel="x", mark=(1, "m"), ax=ax),
    }


KINDS = sorted(every_kind())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_shown_and_is_quiet(kind, capsys):
    settings = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = every_kind()[kind]()
        shown = bundle(figure, " what  it shows ")
    assert shown["text/plain"] == "what it shows"
    png = base64.b64decode(shown["image/png"])
    image = Image.open(io.BytesIO(png))
    assert image.mode == "P" and image.info.get("Software") is None
    corner = "#{:02x}{:02x}{:02x}".format(*image.convert("RGB").getpixel((0, 0)))
    assert corner == PAPER and len(png) < 40_000
    assert not plt.get_fignums() and capsys.readouterr() == ("", "")
    assert {n: v for n, v in settings.items() if matplotlib.rcParams[n] != v} == {}


@pytest.mark.parametrize("kind", ["attention_map", "race_plot"])
def test_the_same_figure_gives_the_same_bytes(kind):
    assert png_bytes(every_kind()[kind]()) == png_bytes(every_kind()[kind]())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_draws_into_given_axes(kind):
    figure, (left, right) = f.canvas(1, 2)
    assert every_kind(ax=right)[kind]() is figure
    assert right.get_title("left") == "t" and not left.has_data()
    assert right.has_data()


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_nine_points_or_more(kind):
    figure = every_kind()[kind]()
    figure.draw_without_rendering()
    sizes = {text.get_text(): text.get_fontsize() for text in figure.findobj(matplotlib.text.Text)}
    assert min(size for text, size in sizes.items() if text) >= 9


def test_series_differ_by_more_than_colour():
    ax = f.race_plot(SWEEP, title="t").axes[0]
    looks = [(line.get_linestyle(), line.get_marker()) for line in ax.lines]
    assert len(set(looks)) == len(looks) == 2 and len({dash for dash, _ in looks}) == 2


def _lightness(colour):
    red, green, blue = matplotlib.colors.to_rgb(colour)
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colour_maps_order_by_lightness():
    ordered = [_lightness(SEQUENTIAL(x)) for x in np.linspace(0, 1, 32)]
    assert ordered == sorted(ordered, reverse=True)
    rising = [_lightness(DIVERGING(x)) for x in np.linspace(0, 0.5, 16)]
    falling = [_lightness(DIVERGING(x)) for x in np.linspace(0.5, 1, 16)]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)


def test_contrast_on_paper():
    assert (_lightness(PAPER) + 0.05) / (_lightness(INK) + 0.05) > 7
    for colour in CYCLE:  # graphics need 2:1 at least: large and drawn with dashes and markers
        assert (_lightness(PAPER) + 0.05) / (_lightness(colour) + 0.05) > 1.9


def test_attention_map_shows_weights_and_what_is_hidden():
    hidden = torch.tensor([[False, True], [False, False]])
    figure = f.attention_map(WEIGHTS, title="t", queries=["a", "b"], keys=["c", "d"], hidden=hidden)
    ax, bar = figure.axes
    drawn = ax.images[0].get_array()
    assert drawn.mask.tolist() == hidden.tolist() and drawn[1, 1] == 0.75
    assert [text.get_text() for text in ax.texts] == ["1.00", "0.25", "0.75"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["c", "d"]
    assert ax.patch.get_hatch() and bar.get_ylabel() == "attention weight"


def test_large_maps_carry_no_numbers():
    assert not f.attention_map(torch.rand(11, 11), title="t").axes[0].texts


def test_mask_plot_says_how_much_is_seen():
    ax = f.mask_plot(torch.ones(4, 4).tril().bool(), title="t").axes[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["seen  62%", "hidden  38%"]
    states = f.mask_plot(torch.tensor([[2, 0], [1, 1]], dtype=torch.int8), title="t").axes[0]
    words = [text.get_text() for text in states.get_legend().get_texts()]
    assert words == ["full  25%", "partial  50%", "empty  25%"]
    assert states.get_xlabel() == "key block"


def test_states_share_one_symmetric_scale():
    figure = f.state_heatmap(torch.tensor([[[1.0]], [[-3.0]]]), title="t", names=["a", "b"])
    assert [ax.images[0].get_clim() for ax in figure.axes[:2]] == [(-3.0, 3.0)] * 2
    assert figure.get_suptitle() == "t"
    assert [ax.get_title() for ax in figure.axes[:2]] == ["a", "b"]


def test_timeline_places_tasks_in_lanes():
    figure = f.timeline(
        [("p1", 0, 2, "r0"), ("p0", 1, 4, "r1", "x")], title="t", lanes=["p0", "p1"]
    )
    ax = figure.axes[0]
    boxes = [(b.get_y() + b.get_height() / 2, b.get_x(), b.get_width()) for b in ax.patches]
    assert boxes == [(1, 0, 2), (0, 1, 3)]
    assert ax.patches[0].get_facecolor() != ax.patches[1].get_facecolor()
    assert [text.get_text() for text in ax.texts] == ["x"] and ax.get_legend() is None
    assert ax.lines[0].get_xdata()[0] == 4


def test_race_plot_names_exponents():
    words = [t.get_text() for t in f.race_plot(SWEEP, title="t").axes[0].get_legend().get_texts()]
    assert words == ["a  $\\propto n^{1.00}$", "b  $\\propto n^{2.00}$"]
    few = f.race_plot({"a": ([2, 1], [3, 4]), "b": {4: 1.0}}, title="t").axes[0]
    assert [text.get_text() for text in few.get_legend().get_texts()] == ["a", "b"]
    assert few.lines[0].get_xdata().tolist() == [1, 2]
    ticks = f.race_plot(SWEEP, title="t").axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == ["256", "512", "1K", "2K", "4K"]


def test_roofline_marks_modelled_hollow_and_measured_solid():
    ax = f.roofline_plot(H100, {"m": (1e6, 1e6), "s": (1e9, 1e6, 1.0)}, title="t").axes[0]
    modelled, measured = ax.lines[-2:]
    assert modelled.get_ydata()[0] == H100.bandwidth and modelled.get_markerfacecolor() == PAPER
    assert measured.get_ydata()[0] == 1e9 and measured.get_markerfacecolor() == CYCLE[1]
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words == ["m (modelled)", "s (measured)"]


def test_bars_write_their_values():
    ax = f.bars({"ours": 2.0, "theirs": 6.28}, title="t", xlabel="s", highlight="ours").axes[0]
    assert [text.get_text() for text in ax.texts] == ["2", "6.28"]
    assert ax.patches[0].get_facecolor() != ax.patches[1].get_facecolor()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: f.attention_map(torch.ones(3), title="t"), "weights must be .* 2 dimensions"),
        (lambda: f.attention_map(torch.ones(0, 3), title="t"), "non-empty"),
        (lambda: f.attention_map(WEIGHTS, title="t", keys=["a"]), "keys must have 2 names, got 1"),
        (lambda: f.attention_map(WEIGHTS, title="t", hidden=torch.ones(1, 2)), "hidden must have"),
        (lambda: f.mask_plot(torch.full((2, 2), 3), title="t"), "block states 0, 1 and 2"),
        (lambda: f.state_heatmap(torch.ones(2, 2, 2), title="t", names=["a"]), "2 entries, got 1"),
        (lambda: f.state_heatmap(torch.ones(2, 2, 2), title="t", ax=f.canvas()[1]), "one state"),
        (lambda: f.timeline([], title="t"), "at least one task"),
        (lambda: f.timeline([(0, 2, 1, "a")], title="t"), "ends at 1, before it starts at 2"),
        (lambda: f.timeline([(5, 0, 1, "a")], title="t", lanes=[0]), "lanes are"),
        (lambda: f.race_plot({}, title="t"), "at least one contestant"),
        (lambda: f.lines([1], {}, title="t", xlabel="x", ylabel="y"), "at least one series"),
        (lambda: f.lines([1], {"a": [1, 2]}, title="t", xlabel="x", ylabel="y"), "'a' must have 1"),
        (lambda: f.lines([1], {"a": [1]}, title="t", xlabel="x", ylabel="y", log="z"), "log must"),
        (lambda: f.roofline_plot(H100, {"a": (1,)}, title="t"), "point 'a'"),
        (lambda: f.roofline_plot(H100, {}, title="t", dtype="int2"), "no peak for dtype"),
        (lambda: f.bars({}, title="t", xlabel="x"), "at least one value"),
        (lambda: f.bars({"a": 1}, title="t", xlabel="x", highlight="b"), "highlight must be"),
        (lambda: f.kernel_card(rows=ROWS, targets=["gfx9"]), r"there are \['sm_80', 'sm_90'\]"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_kernel_card_as_html_and_text():
    card = f.kernel_card(rows=ROWS, title="Card & more")
    page, text = card._repr_html_(), repr(card)
    assert "<caption>Card &amp; more</caption>" in page and "<td>split._merge&lt;x&gt;</td>" in page
    assert page.count("<tr>") == 3 and '<th scope="col">registers</th>' in page
    assert "| kernel | target | registers | spills |" in text
    assert "| split._forward | sm_90 | 168 | 8 |" in text
    assert [row["target"] for row in f.kernel_card(rows=ROWS, targets=["sm_90"]).rows] == ["sm_90"]


def test_kernel_card_reads_the_shipped_report():
    card = f.kernel_card("split_kv_decode", targets=["sm_90"])
    assert {row["target"] for row in card.rows} == {"sm_90"} and "registers" in card.columns
    with pytest.raises(ValueError, match="got 'no_such_kernel'"):
        f.kernel_card("no_such_kernel")


def _plain(**labels):
    figure, ax = f.canvas()
    ax.plot([1, 2])
    ax.set(**({"title": "t", "xlabel": "x", "ylabel": "y"} | labels))
    return figure


def test_show_refuses_what_a_reader_would_miss():
    bundle(_plain(), "alt")
    for labels, message in [
        ({"title": ""}, "lacks a title"),
        ({"xlabel": ""}, "lacks a label of the x axis"),
        ({"ylabel": ""}, "lacks a label of the y axis"),
    ]:
        with pytest.raises(ValueError, match=message):
            bundle(_plain(**labels), "alt")
    with pytest.raises(ValueError, match="show needs alt"):
        f.show(_plain(), "")
    with pytest.raises(TypeError, match="needs a matplotlib figure, got int"):
        f.show(3, "alt")


def test_shared_axes_and_figure_titles_are_enough():
    figure, axes = f.canvas(1, 2, sharey=True)
    for ax in axes:
        ax.plot([1, 2])
        ax.set_xlabel("x")
    figure.suptitle("t")
    with pytest.raises(ValueError, match="y axis"):
        bundle(figure, "alt")
    axes[0].set_ylabel("y")
    bundle(figure, "alt")


def test_axes_without_ticks_or_with_words_need_no_label():
    figure = _plain(ylabel="")
    figure.axes[0].set_yticks([1, 2], ["one", "two"])
    bundle(figure, "alt")
    off = _plain(xlabel="", ylabel="")
    off.axes[0].set_xticks([])
    off.axes[0].set_yticks([])
    bundle(off, "alt")


def test_show_closes_a_figure_of_pyplot():
    figure, ax = plt.subplots()
    ax.set(title="t", xlabel="x", ylabel="y")
    bundle(figure, "alt")
    assert not plt.get_fignums()


def test_show_displays_one_image(capsys):
    f.show(_plain(), "what it shows")
    assert capsys.readouterr() == ("what it shows\n", "")


def test_canvas_is_a_figure_in_style_whatever_the_settings():
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        figure, ax = f.canvas()
        assert isinstance(figure, Figure) and ax.title.get_fontsize() == 11.5
        assert matplotlib.colors.to_hex(ax.get_facecolor()) == PAPER
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.slow
def test_measure_does_not_import_matplotlib():
    code = (
        "import sys, corelib.measure; corelib.measure.registered;"
        "assert not {'matplotlib', 'triton', 'IPython'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
