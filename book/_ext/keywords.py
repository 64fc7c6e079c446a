"""Names under which the search finds a page although its text spells them otherwise.

``_keywords.json`` in the source tree maps a page to its names; they become the page's keywords,
which Sphinx indexes like its text.
"""

from __future__ import annotations

import json
import pathlib

from docutils import nodes


def add_keywords(app, doctree):
    names = app.config.page_keywords.get(app.env.docname)
    if names:
        doctree.insert(0, nodes.meta(name="keywords", content=", ".join(names)))


def read_keywords(app, config):
    path = pathlib.Path(app.srcdir, "_keywords.json")
    config.page_keywords = json.loads(path.read_text(encoding="utf-8"))


def setup(app):
    app.add_config_value("page_keywords", {}, "")
    app.connect("config-inited", read_keywords)
    app.connect("doctree-read", add_keywords)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
