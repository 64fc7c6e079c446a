"""A lab in JupyterLab, as a learner opens it: run all cells, then move a slider."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LABS = sorted(path for path in (ROOT / "labs").rglob("*.ipynb") if path.parent.name[:2].isdigit())
WITH_EXPLORER = [path for path in LABS if "explore(" in path.read_text(encoding="utf-8")]
# All cells are kept in the page: JupyterLab drops those out of sight, with their outputs.
KEEP_CELLS = {"windowingMode": "none"}
# A traceback, or anything on stderr: labs write nothing there.
ERROR = "[data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type$='jupyter.error']"


@pytest.fixture(scope="module")
def jupyterlab(tmp_path_factory):
    """Address of a JupyterLab with its own settings, over a copy of the labs."""
    pytest.importorskip("jupyterlab")
    folder = tmp_path_factory.mktemp("jupyterlab")
    skip = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
    shutil.copytree(ROOT / "labs", folder / "labs", ignore=skip)
    settings = folder / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(KEEP_CELLS))
    environment = dict(os.environ)
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        environment[name] = str(folder / name.lower())
    environment["JUPYTERLAB_WORKSPACES_DIR"] = str(folder / "workspaces")
    environment["JUPYTERLAB_SETTINGS_DIR"] = str(folder / "settings")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0"]
    command += ["--IdentityProvider.token=t", f"--ServerApp.root_dir={folder / 'labs'}"]
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        yield f"http://127.0.0.1:{_port(folder, server)}/lab"
    finally:
        server.terminate()
        server.wait(timeout=30)


def _port(folder: pathlib.Path, server: subprocess.Popen, patience: float = 60) -> int:
    end = time.monotonic() + patience
    while time.monotonic() < end and server.poll() is None:
        for path in (folder / "jupyter_runtime_dir").glob("jpserver-*.json"):
            if text := path.read_text():
                return json.loads(text)["port"]
        time.sleep(0.2)
    raise RuntimeError("JupyterLab did not start:\n" + (folder / "log.txt").read_text()[-3000:])


def test_there_is_a_lab_with_an_explorer():
    assert WITH_EXPLORER


@pytest.mark.parametrize("lab", WITH_EXPLORER[:2], ids=lambda path: path.stem)
def test_run_all_then_move_a_slider(jupyterlab, chromium, lab):
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    address = lab.relative_to(ROOT / "labs").as_posix()
    page.goto(f"{jupyterlab}/tree/{address}?token=t&reset")
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
    # The execution indicator says idle too early; the status bar waits for the kernel.
    page.get_by_text("| Idle").first.wait_for(timeout=60_000)
    page.click("[data-command='notebook:restart-run-all']")
    page.click("dialog .jp-mod-accept, .jp-Dialog .jp-mod-accept")
    # The committed numbers stand until the kernel is there again.
    page.get_by_text("[*]:").first.wait_for(timeout=60_000)
    page.wait_for_function(_STOPPED, arg=ERROR, timeout=240_000)
    failed = page.locator(ERROR)
    assert failed.count() == 0, failed.first.inner_text()
    image = page.locator("img.widget-image").first
    before = image.get_attribute("src")
    page.locator(".jupyter-widgets .noUi-handle").first.press("ArrowRight")
    page.wait_for_function(
        "before => document.querySelector('img.widget-image').src !== before", arg=before
    )
    page.close()


# An error, or every code cell shows a number: none waits ("*") and none was left out (folded
# ones aside, which have no editor).
_STOPPED = """error => document.querySelector(error) ||
  [...document.querySelectorAll('.jp-CodeCell')].every(cell =>
    !cell.querySelector('.cm-content')?.innerText.trim() ||
    /\\d/.test(cell.querySelector('.jp-InputPrompt').innerText))"""
