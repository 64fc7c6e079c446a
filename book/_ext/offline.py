"""Keep the built pages free of addresses that a reader without a network would wait for.

The theme loads Thebe (live code) from a CDN; nothing here uses it. MathJax and its fonts are
copied from the package sphinx-mathjax-offline, only the parts that pages ask for (1.8 of 25 MB).
"""

from __future__ import annotations

import importlib.util
import pathlib

from sphinx.errors import ExtensionError
from sphinx.util.fileutil import copy_asset

REMOTE = ("thebe", "require.min.js", "cdnjs.", "unpkg.", "jsdelivr.")
MATHJAX_PARTS = {
    "tex-chtml-full.js": "mathjax",
    "output/chtml/fonts/woff-v2": "mathjax/output/chtml/fonts/woff-v2",
}


def drop_remote_scripts(app, pagename, templatename, context, doctree):
    """Remove script and style files that live on another server or that only serve Thebe."""
    for kind in ("script_files", "css_files"):
        kept = [
            file
            for file in context.get(kind, [])
            if not any(word in str(getattr(file, "filename", file) or "") for word in REMOTE)
            and not any(word in str(getattr(file, "attributes", "")) for word in REMOTE)
        ]
        context[kind] = kept


def copy_mathjax(app, exception):
    """Copy MathJax and its fonts next to the pages, keeping their relative places."""
    if exception is not None or app.builder.format != "html":
        return
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    if package is None:
        raise ExtensionError("formulas need sphinx-mathjax-offline: pip install -e '.[book]'")
    source = pathlib.Path(package.origin).parent / "static/mathjax"
    for part, place in MATHJAX_PARTS.items():
        copy_asset(str(source / part), str(pathlib.Path(app.outdir, "_static", place)))


def setup(app):
    app.connect("html-page-context", drop_remote_scripts, priority=900)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
