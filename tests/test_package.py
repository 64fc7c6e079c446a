"""The package as a reuser gets it: what importing costs, what the wheel holds, what may not be."""

from __future__ import annotations

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = ("triton", "matplotlib", "transformers", "ipywidgets", "IPython", "scipy", "pandas")


def python(code: str, cwd: pathlib.Path = ROOT, **env: str) -> str:
    """What ``code`` prints in a fresh interpreter."""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, **env}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- importing


def test_importing_corelib_loads_nothing_but_corelib():
    code = (
        "import sys; before = set(sys.modules); import corelib\n"
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    loaded = set(python(code).split())
    assert loaded - set(sys.stdlib_module_names) == {"corelib"}


def test_using_corelib_loads_no_heavy_library():
    code = (
        "import sys, corelib\n"
        "from corelib import contracts, find, measure, methods, primitives, teach, testing\n"
        "from corelib.primitives import attention\n"
        "from corelib.teach import check, claim, exercise, ledger_markdown\n"
        "import corelib.kernels, corelib.results\n"
        "methods(); find(172).works, find(172).load()\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules])"
    )
    assert python(code).split() == []


def test_dir_names_what_can_be_had():
    code = "import corelib\nfor name in corelib.__all__: getattr(corelib, name)"
    python(code)


EVERY_MODULE = """
import importlib, pkgutil, sys
import corelib
for info in pkgutil.walk_packages(corelib.__path__, "corelib."):
    if "__main__" not in info.name:
        importlib.import_module(info.name)
"""


def test_every_module_imports_where_triton_is_missing():
    python("import sys; sys.modules['triton'] = None\n" + EVERY_MODULE)


def test_every_module_imports_where_the_labs_extra_is_missing():
    missing = ("IPython", "nbformat", "nbclient", "transformers", "tqdm", "scipy", "pytest")
    python(f"import sys\nfor m in {missing}: sys.modules[m] = None\n" + EVERY_MODULE)


# ---- what is declared agrees with what is there


def test_packages_list_names_every_folder():
    folders = {path.parent for path in (ROOT / "corelib").rglob("*.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    for folder in {path.parent for path in (ROOT / "kernels").rglob("*.py")}:
        found.add(".".join(("corelib", *folder.relative_to(ROOT).parts)))
    assert found == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_every_package_has_an_init():
    """A folder without one is a namespace package, which the lazy imports do not see."""
    for name in PYPROJECT["tool"]["setuptools"]["packages"]:
        parts = name.split(".")
        parts = parts[1:] if parts[:2] == ["corelib", "kernels"] else parts
        assert ROOT.joinpath(*parts, "__init__.py").exists(), name


def test_conda_environment_is_in_step_with_pyproject():
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    listed = [line.strip()[2:] for line in lines if line.startswith("      - ")]
    project = PYPROJECT["project"]
    assert listed[0].startswith("-e .[")
    extras = set(listed[0][listed[0].index("[") + 1 : -1].split(","))
    assert extras == set(project["optional-dependencies"]) - {"peers", "sentences"}
    assert listed[1:] == project["dependencies"]
    assert f"  - python{project['requires-python']}" in lines


def test_lock_meets_the_ranges():
    from packaging.requirements import Requirement

    project = PYPROJECT["project"]
    lines = (ROOT / "requirements/lock.txt").read_text(encoding="utf-8").splitlines()
    locked = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, version = line.partition(";")[0].strip().split("==")
            locked[name.lower().replace("_", "-")] = version
    wanted = [*project["dependencies"]]
    for extra in ("labs", "book", "test", "hf"):
        wanted += project["optional-dependencies"][extra]
    for text in wanted:
        need = Requirement(text)
        name = need.name.lower().replace("_", "-")
        if name == "tomli":  # only for Pythons that the lock is not for
            continue
        assert need.specifier.contains(locked[name], prereleases=True), (text, locked[name])


# ---- what may not be in it


def tracked() -> list[pathlib.Path]:
    """Files that git has or would take; in an unpacked archive, all but what is built."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        found = [ROOT / line for line in done.stdout.splitlines()]
    else:
        built = {".venv", "build", "dist", "__pycache__", ".ipynb_checkpoints"}
        found = [path for path in ROOT.rglob("*") if not built & set(path.parts)]
    return [path for path in found if path.is_file()]


TEXT = {".py", ".md", ".toml", ".yml", ".yaml", ".json", ".txt", ".ipynb", ".cff", ".css", ".js"}
# Folders of a person (ann is made up) or of a build machine, pieced together not to match here.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/-])/(?:" + "|".join(("work", "root", "home")) + r")/(?!ann\b)[\w.-]+"
)
REGISTRY = re.compile(r"--(?:extra-)?index-url|--find-links|(?:^|\s)@ file:")


def test_no_machine_paths_and_no_registry_addresses():
    found = []
    for path in tracked():
        if path.suffix in TEXT and path != pathlib.Path(__file__):
            text = path.read_text(encoding="utf-8")
            for pattern in (MACHINE_PATH, REGISTRY):
                if match := pattern.search(text):
                    found.append(f"{path.relative_to(ROOT)}: {match[0]}")
    assert found == []


def test_the_path_pattern_finds_paths():
    home = "/home" + "/someone"
    assert MACHINE_PATH.search(f"saved to {home}/x.png")
    assert not MACHINE_PATH.search(f"https://example.org{home}")


def sources(*folders: str) -> list[tuple[pathlib.Path, ast.Module]]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


FORBIDDEN = {"eval", "exec", "pickle.load", "pickle.loads", "torch.load", "socket.socket"}


def test_nothing_unpickles_evaluates_strings_or_opens_a_socket():
    """The kernels' gates build mutants from source, in tests' processes only."""
    for path, tree in sources("corelib", "kernels"):
        if path.is_relative_to(ROOT / "kernels/gates"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in FORBIDDEN, f"{path}:{node.lineno}"


def imported(tree: ast.Module, path: pathlib.Path) -> set[str]:
    """Dotted names of everything imported in a file, relative imports resolved."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("corelib", *parts) if parts[0] == "kernels" else parts
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def test_relative_imports_are_resolved():
    tree = ast.parse("from ..teach import claim\nfrom . import masks\nimport torch.nn")
    found = imported(tree, ROOT / "corelib/primitives/attention.py")
    assert {"corelib.teach.claim", "corelib.primitives.masks", "torch.nn"} <= found
    assert "corelib.kernels.gates" in imported(
        ast.parse("from . import gates"), ROOT / "kernels/x.py"
    )


# Which room may not reach into which (the folders are explained in the README).
NOT_FROM = {
    "kernels": ("corelib.teach", "corelib.models", "corelib.hf", "transformers"),
    "corelib/primitives": ("corelib.teach", "corelib.models", "corelib.measure", "corelib.hf"),
    "corelib/measure": ("corelib.teach", "corelib.models", "matplotlib"),
    "corelib/data": ("corelib.teach", "corelib.models", "corelib.measure"),
    "corelib": ("kernels", "pytest", "hypothesis"),
}


@pytest.mark.parametrize("room", NOT_FROM)
def test_rooms_keep_their_walls(room):
    for path, tree in sources(room):
        race = path.is_relative_to(ROOT / "corelib/measure/races")  # races may run whole models
        for name in imported(tree, path):
            for wall in NOT_FROM[room]:
                if race and wall == "corelib.models":
                    continue
                assert name != wall and not name.startswith(wall + "."), f"{path}: imports {name}"


def test_only_teach_draws():
    for path, tree in sources("corelib", "kernels"):
        if not path.is_relative_to(ROOT / "corelib/teach"):
            drawn = [
                m for m in imported(tree, path) if m.split(".")[0] in ("matplotlib", "ipywidgets")
            ]
            assert not drawn or path.is_relative_to(ROOT / "corelib/measure"), (path, drawn)


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_style(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


# ---- wheel and strict editable install


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> pathlib.Path:
    """The sources in a place where building may leave its traces."""
    place = tmp_path_factory.mktemp("source")
    for path in tracked():
        name = path.relative_to(ROOT)
        if name.parts[0] in ("corelib", "kernels") or len(name.parts) == 1:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place / name)
    return place


@pytest.fixture(scope="module")
def wheel(copy, tmp_path_factory) -> pathlib.Path:
    """The built wheel. No isolation: the build must need no network."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_everything_and_no_top_level_kernels(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for source in (ROOT / "kernels").rglob("*.py"):
        assert f"corelib/kernels/{source.relative_to(ROOT / 'kernels').as_posix()}" in names
    for source in tracked():
        if source.is_relative_to(ROOT / "corelib"):
            assert source.relative_to(ROOT).as_posix() in names
    data = ("catalog.toml", "results.json", "py.typed", "kernels/report.json")
    assert {f"corelib/{name}" for name in data} <= names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"corelib", next(top for top in tops if top.endswith(".dist-info"))}


USE = """
import pathlib, corelib, corelib.kernels, corelib.kernels.gates
from corelib import find, methods
assert len(methods()) == 209
lean = find("lean attention")
assert isinstance(lean.works, bool) and "results" not in lean.parts
lean.load()
print(pathlib.Path(corelib.__file__).parent)
print(pathlib.Path(corelib.kernels.__file__).parent)
"""


@pytest.mark.slow
def test_wheel_installs_and_works(wheel, tmp_path):
    target = tmp_path / "target"
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    where = python(USE, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()
    assert where == [str(target / "corelib"), str(target / "corelib/kernels")]


@pytest.mark.slow
def test_strict_editable_install_works(copy, tmp_path):
    """setuptools' own hook makes the tree of links that `pip install -e` would put on the path."""
    build = (
        "from setuptools import build_meta\n"
        f"print(build_meta.build_editable({str(tmp_path)!r}, {{'editable_mode': 'strict'}}))"
    )
    name = python(build, cwd=copy).splitlines()[-1]
    with zipfile.ZipFile(tmp_path / name) as archive:
        pth = next(n for n in archive.namelist() if n.endswith(".pth"))
        tree = archive.read(pth).decode().strip()
    where = python(USE, cwd=tmp_path, PYTHONPATH=tree).splitlines()
    assert where == [f"{tree}/corelib", f"{tree}/corelib/kernels"]
