"""The built book as a reader meets it: opened from its files, with no network behind it."""

from __future__ import annotations

import collections
import functools
import html.parser
import pathlib
import urllib.parse

import pytest

PHONE = {"width": 390, "height": 844}
# Puts the article of another page of the same template into this one.
SHOW_INSTEAD = """async text => {
  const other = new DOMParser().parseFromString(text, "text/html");
  document.querySelector(".bd-main").replaceWith(other.querySelector(".bd-main"));
  await Promise.all([...document.images].map((image) => image.decode().catch(() => {})));
}"""
SURVEY = (pathlib.Path(__file__).parent / "survey.js").read_text(encoding="utf-8")
LOCAL = ("file:", "data:", "blob:", "about:")
# One fixture visits every page: minutes, and on a slow machine a quarter of an hour.
pytestmark = pytest.mark.timeout(2700)


def _open(chromium):
    """A page that refuses the network, and the lists that fill while it is used."""
    context = chromium.new_context(viewport=PHONE, reduced_motion="reduce")
    outside, errors = [], []

    def guard(route):
        if route.request.url.startswith(LOCAL):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    context.route("**/*", guard)
    page = context.new_page()
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.extend(_lost(request)))
    return page, outside, errors


def _lost(request):
    """What could not be loaded; a request cut short by leaving the page is no error of the page."""
    return [] if request.failure == "net::ERR_ABORTED" else [f"not loaded: {request.url}"]


@pytest.fixture(scope="module")
def survey(book, chromium):
    """Every page seen on a phone's screen: page name -> what was found there.

    Labs, parts and the book's own pages are opened. The pages of modules are hundreds of one
    template and hold no formulas: they take turns in the frame of one, which is ten times as fast.
    """
    pages = [path for path in sorted(book.rglob("*.html")) if "_static" not in path.parts]
    modules = [path for path in pages if path.parent.name == "api" and _without_formulas(path)]
    found = _survey(chromium, sorted(set(pages) - set(modules)))
    found |= _survey_in_frame(chromium, modules[0], modules)
    return {path.relative_to(book).as_posix(): found[path] for path in pages}


def _without_formulas(path):
    return 'class="math' not in path.read_text(encoding="utf-8")


def _survey(chromium, pages):
    page, outside, errors = _open(chromium)
    found = {}
    for path in pages:
        page.goto(path.as_uri())
        found[path] = _look(page, outside, errors)
    page.context.close()
    return found


def _survey_in_frame(chromium, frame, pages):
    """As `_survey`: ``frame`` is opened, of the others only what it does not share is shown."""
    page, outside, errors = _open(chromium)
    page.goto(frame.as_uri())
    found = {}
    for path in pages:
        page.evaluate(SHOW_INSTEAD, path.read_text(encoding="utf-8"))
        found[path] = _look(page, outside, errors)
    page.context.close()
    return found


def _look(page, outside, errors):
    result = page.evaluate(SURVEY)
    result |= {"outside": list(outside), "errors": list(errors)}
    outside.clear()
    errors.clear()
    return result


WRONG = """<p style="color: #333">faint</p><div style="width: 500px">wide</div>
<img src="https://example.org/picture.png"><div class="math">raw formula</div>
<mjx-container><mjx-merror>broken</mjx-merror></mjx-container><div class="math"></div>
<img src="missing.png" alt="none"><div class="explore"><img src="missing.png" alt="none">
<label>stuck<input type="range" min="0" max="3"></label></div>"""
DARK = '<!doctype html><body><div class="bd-main" style="background: #111; color: #eee">'


def test_the_survey_sees_what_is_wrong(chromium, tmp_path):
    bad = f'{DARK}<div class="bd-article">{WRONG}<script>console.error("oh")</script></div></div>'
    (tmp_path / "bad.html").write_text(bad)
    (found,) = _survey(chromium, [tmp_path / "bad.html"]).values()
    _assert_all_is_seen(found)
    assert "oh" in found["errors"]


def test_the_survey_in_a_frame_sees_the_same(chromium, tmp_path):
    good = "<p>fine</p>"
    for name, text in {"frame": good, "bad": WRONG, "good": good}.items():
        page = f'{DARK}<div class="bd-article">{text}</div></div>'
        (tmp_path / f"{name}.html").write_text(page)
    paths = [tmp_path / "bad.html", tmp_path / "good.html"]
    bad, fine = _survey_in_frame(chromium, tmp_path / "frame.html", paths).values()
    _assert_all_is_seen(bad)
    assert fine["width"] <= PHONE["width"]
    assert not any(value for name, value in fine.items() if name != "width")


def _assert_all_is_seen(found):
    assert found["outside"] == ["https://example.org/picture.png"]
    assert any(line.startswith("not loaded:") and "missing" in line for line in found["errors"])
    assert found["width"] > PHONE["width"] and len(found["faint"]) == 1
    assert found["unrendered"] == 1 and found["broken_formulas"] == ["broken"]
    assert found["without_alt"] == 1 and found["broken_images"]
    assert found["sliders"] == 1 and found["dead_sliders"] == ["0"]


def _troubles(survey, name):
    return {page: result[name] for page, result in survey.items() if result[name]}


def test_no_page_asks_the_network(survey):
    assert not _troubles(survey, "outside")


def test_no_page_logs_an_error(survey):
    assert not _troubles(survey, "errors")


def test_every_formula_is_rendered(survey):
    assert not _troubles(survey, "broken_formulas")
    assert not _troubles(survey, "unrendered")
    assert sum(result["formulas"] for result in survey.values()) > 10


def test_every_image_is_there_and_described(survey):
    assert not _troubles(survey, "broken_images")
    assert not _troubles(survey, "without_alt")


def test_nothing_overflows_on_a_phone(survey):
    wide = {page: r["width"] for page, r in survey.items() if r["width"] > PHONE["width"]}
    assert not wide


def test_dark_mode_is_readable(survey):
    assert not _troubles(survey, "faint")


def test_sliders_move_their_figures(survey):
    assert not _troubles(survey, "dead_sliders")
    labs = [page for page in survey if page.startswith("labs/")]
    assert sum(survey[page]["sliders"] > 0 for page in labs) > len(labs) / 2


def test_a_slider_follows_the_keyboard(book, chromium):
    page, outside, errors = _open(chromium)
    page.goto((book / "labs/00_foundations/002_softmax_as_a_reduction.html").as_uri())
    explorer = page.locator(".explore").first
    image, slider = (explorer.locator(name).first for name in ("img", "input[type=range]"))
    before = image.get_attribute("src")
    at_end = slider.evaluate("slider => slider.value === slider.max")
    slider.press("ArrowLeft" if at_end else "ArrowRight")
    assert image.get_attribute("src") != before
    assert not outside and not errors
    page.context.close()


@pytest.mark.parametrize("query", ["LeanAttention", "lean attention"])
def test_search_finds_a_paper(book, chromium, query):
    page, outside, errors = _open(chromium)
    page.goto(f"{(book / 'search.html').as_uri()}?q={urllib.parse.quote(query)}")
    page.wait_for_function(
        "document.querySelector('#search-results p')?.innerText.includes('found')"
    )
    found = page.locator("#search-results li a").evaluate_all("links => links.map(a => a.href)")
    assert any("labs/00_foundations/002_" in address for address in found), found
    assert not outside and not errors
    page.context.close()


def test_catalog_filter(book, chromium):
    page, _, _ = _open(chromium)
    page.goto((book / "catalog.html").as_uri())
    rows = page.locator("table.catalog tbody tr")
    shown = page.locator("table.catalog tbody tr:not([hidden])")
    assert rows.count() == shown.count() == 209
    page.get_by_label("Filter papers by text").fill("LeanAttention")
    assert shown.count() == 1 and "172" in shown.first.inner_text()
    page.get_by_label("Filter papers by text").fill("")
    page.get_by_label("Filter papers by part").select_option("Evaluation")
    assert shown.count() == 7
    page.get_by_label("Filter papers by text").fill("no such paper")
    assert shown.count() == 0
    page.context.close()


class _Anchors(html.parser.HTMLParser):
    """The addresses that a page points to, and the places in it that can be pointed to."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.places = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.places |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        self.targets |= {attributes[name] for name in ("href", "src") if attributes.get(name)}


def test_internal_links_resolve(book):
    anchors = functools.cache(lambda path: _Anchors(path.read_text(encoding="utf-8")))
    broken = collections.defaultdict(list)
    for path in book.rglob("*.html"):
        if "_static" in path.parts:
            continue
        for target in anchors(path).targets:
            address = urllib.parse.urlsplit(target)
            if address.scheme or address.netloc:
                continue
            file = (path.parent / urllib.parse.unquote(address.path)).resolve()
            file = path if not address.path else file
            place = urllib.parse.unquote(address.fragment)
            if not file.is_file():
                broken[path.name].append(target)
            elif place and file.suffix == ".html" and place not in anchors(file).places:
                broken[path.name].append(target)
    assert not broken
