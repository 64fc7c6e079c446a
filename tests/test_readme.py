"""What README.md shows to copy and paste runs as it stands."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[-1][:30])
def test_python_examples_run(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_there_is_an_example():
    assert PYTHON


def test_named_files_exist():
    names = re.findall(
        r"`((?:labs|corelib|kernels|tests|book)/[\w./]*\.(?:py|toml|ipynb))`", README
    )
    links = re.findall(r"\]\(([\w./]+)\)", README)
    assert names and links
    missing = [name for name in names + links if not (ROOT / name).exists()]
    assert not missing


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"make ([a-z]+(?:-[a-z]+)?)", README)) | {
        "quick",
        "run-lab",
        "gpu-check",
    }
    assert named <= targets, named - targets
