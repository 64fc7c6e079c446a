"""Explorers: the page's version by its text and in a browser, the notebook's by its widgets."""

import base64
import hashlib
import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from corelib.teach.explore import Explorer, explore
from corelib.teach.style import canvas


def draw(number, wide=False):
    figure, ax = canvas(size=(2.4 if wide else 2, 1.5))
    ax.plot([0, number], [0, 1])
    ax.set(title=f"n = {number}", xlabel="x (m)", ylabel="y (m)")
    return figure


@pytest.fixture(scope="module")
def explorer():
    return Explorer(
        draw, alt='A "line" <rising>.', title="Lines", number=[1, 2, 1024], wide=[False, True]
    )


def test_frames_are_small_palette_images_in_the_order_of_the_sliders(explorer):
    assert len(explorer.frames) == 6 == len(set(explorer.frames))
    images = [Image.open(io.BytesIO(frame)) for frame in explorer.frames]
    assert all(image.mode == "P" for image in images)
    widths = [image.width for image in images]
    assert widths[0::2] == [widths[0]] * 3 and widths[1] > widths[0]
    assert explorer.index(number=2, wide=True) == 3


def test_html_holds_what_a_page_needs(explorer):
    page = explorer.html()
    data = json.loads(re.search(r'application/json">(.*?)</script>', page, re.S)[1])
    assert data["sliders"] == [
        {"label": "number", "values": ["1", "2", "1,024"]},
        {"label": "wide", "values": ["no", "yes"]},
    ]
    first = re.search(r'src="data:image/png;base64,([^"]*)"', page)[1]
    assert base64.b64decode(first) == explorer.frames[0]
    assert [base64.b64decode(f) for f in data["frames"][1:]] == explorer.frames[1:]
    name = "explore-" + hashlib.sha256(b"".join(explorer.frames)).hexdigest()[:12]
    assert f'class="explore" id="{name}"' in page and page.count(f"#{name}:not") == 1
    assert 'alt="A &quot;line&quot; &lt;rising&gt;."' in page and "max-width:100%" in page
    for i in range(2):  # each slider has a label
        assert f'<label for="{name}-{i}">' in page and f'<input id="{name}-{i}"' in page
    assert "http" not in page


def test_plain_text_is_stable(explorer):
    assert explorer.summary() == (
        'Lines: A "line" <rising>. [sliders: number 1 … 1,024; wide no … yes]'
    )
    again = Explorer(
        draw, alt='A "line" <rising>.', title="Lines", number=(1, 2, 1024), wide=(False, True)
    )
    assert again.html() == explorer.html()


def test_widget_switches_frames(explorer):
    box = explorer.widget()
    _, number, wide, image = box.children
    assert image.value == explorer.frames[0]
    number.value, wide.value = 2, 1
    assert image.value == explorer.frames[5]
    wide.value = 0
    assert image.value == explorer.frames[4]
    assert [text for text, _ in number.options] == ["1", "2", "1,024"]


def test_without_a_kernel_no_widget_is_offered(explorer):
    assert set(explorer.bundle()) == {"text/html", "text/plain"}


def test_with_a_kernel_all_three_are(explorer, monkeypatch):
    monkeypatch.setattr(sys.modules[explore.__module__], "has_kernel", lambda: True)
    bundle = explorer.bundle()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"] == explorer.summary()


def test_values_may_be_numpy_and_words():
    made = Explorer(
        lambda where, size: draw(float(size)), alt="x", where=["a<b"], size=np.array([0.125, 2.0])
    )
    assert made.summary() == "x [sliders: where a<b … a<b; size 0.125 … 2]"
    assert "a&lt;b" in made.html() and '"a\\u003cb"' in made.html()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alt": " ", "number": [1]}, "explore needs alt"),
        ({"alt": "x"}, "at least one slider"),
        ({"alt": "x", "number": []}, "'number' has no values"),
        ({"alt": "x", "number": 3}, "'number' must be a sequence of values, got 3"),
        ({"alt": "x", "number": "abc"}, "must be a sequence"),
        (
            {"alt": "x", "number": range(5), "wide": range(5)},
            r"5 \(number\) × 5 \(wide\) = 25 frames, at most 24. Give the sliders fewer",
        ),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        explore(draw, **options)


def test_a_frame_must_be_a_labelled_figure():
    with pytest.raises(TypeError, match=r"must return a matplotlib figure, for \{'n': 1\}"):
        explore(lambda n: None, alt="x", n=[1])
    with pytest.raises(ValueError, match=r"for \{'n': 1\} lacks a title and a label of the x axis"):
        explore(lambda n: canvas()[0], alt="x", n=[1])


def test_axes_do_as_well_as_their_figure():
    assert len(Explorer(lambda n: draw(n).axes[0], alt="x", n=[1]).frames) == 1


@pytest.fixture(scope="module")
def page(explorer, tmp_path_factory):
    """A page with the explorer twice, in a phone-sized browser."""
    if shutil.which("chromium") is None:
        pytest.skip("needs chromium on the path")
    sync_api = pytest.importorskip("playwright.sync_api")
    file = tmp_path_factory.mktemp("explore") / "page.html"
    file.write_text(f"<!doctype html><meta charset=utf-8>{explorer.html() * 2}", "utf-8")
    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic"]
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.errors = []
        page.on("console", lambda message: page.errors.append(message.text))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(file.as_uri())
        yield page
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("copy", [0, 1])
def test_keyboard_moves_the_figure_without_a_kernel(page, explorer, copy):
    box = page.locator(".explore").nth(copy)
    image, sliders = box.locator("img"), box.locator("input")

    def frame():
        return base64.b64decode(image.get_attribute("src").split(",")[1])

    assert frame() == explorer.frames[0]
    sliders.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert frame() == explorer.frames[2]
    assert sliders.nth(0).get_attribute("aria-valuetext") == "2"
    sliders.nth(1).focus()
    page.keyboard.press("End")
    assert frame() == explorer.frames[3]
    assert box.locator("output").all_inner_texts() == ["2", "yes"]
    assert image.get_attribute("alt") == 'A "line" <rising>. (number = 2, wide = yes)'
    for i in range(2):
        sliders.nth(i).focus()
        page.keyboard.press("Home")
    assert frame() == explorer.frames[0] and page.errors == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
