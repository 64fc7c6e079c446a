"""The API reference, read from the source: nothing is imported, so nothing can fail to import."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass

from .markdown import escape, fence, from_docstring, link

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
ROOMS = {"corelib": "corelib", "kernels": "corelib.kernels"}  # folder -> name when installed


@dataclass(frozen=True)
class Module:
    """A module of the package: its dotted name and its parsed source."""

    name: str
    tree: ast.Module
    is_package: bool

    @property
    def document(self) -> str:
        return f"api/{self.name}"

    @property
    def summary(self) -> str:
        """The first sentence of its docstring."""
        head = (ast.get_docstring(self.tree) or "").split("\n\n")[0]
        return " ".join(head.split()).rstrip(".:")

    @property
    def package(self) -> str:
        return self.name if self.is_package else self.name.rpartition(".")[0]

    def public(self) -> list[Definition]:
        """Functions and classes without a leading underscore, or those of ``__all__``."""
        exported = _all_names(self.tree)
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = [node for node in self.tree.body if isinstance(node, kinds)]
        found = [node for node in found if not node.name.startswith("_")]
        return [node for node in found if node.name in exported] if exported else found


def read_modules(root: pathlib.Path) -> list[Module]:
    """Every public module of ``corelib/`` and ``kernels/``, in the order of their names."""
    return sorted(_read(root), key=lambda module: module.name)


def _read(root: pathlib.Path) -> Iterator[Module]:
    for folder, base in ROOMS.items():
        for path in (root / folder).rglob("*.py"):
            inner = path.relative_to(root / folder).with_suffix("").parts
            is_package = inner[-1] == "__init__"
            inner = inner[:-1] if is_package else inner
            if any(part.startswith("_") for part in inner):
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            yield Module(".".join((base, *inner)), tree, is_package)


def _all_names(tree: ast.Module) -> set[str]:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return {
                item.value
                for item in ast.walk(node.value)
                if isinstance(item, ast.Constant) and isinstance(item.value, str)
            }
    return set()


def index_page(modules: list[Module]) -> str:
    """One table a package, a row a module."""
    lines = [
        "# API reference",
        "Every public name with its signature and docstring, read from the source. Sizes and "
        "contracts are explained once, in "
        + link("`corelib.contracts`", "api/corelib.contracts", here="api/index")
        + "; where a shape is given, the tests run with it enforced.",
    ]
    for package in sorted({module.package for module in modules}, key=_package_order):
        rows = [
            f"| {link(f'`{m.name}`', m.document, here='api/index')} | {escape(m.summary)} |"
            for m in modules
            if m.package == package
        ]
        lines += [f"## {package}", "| module | what |\n| --- | --- |\n" + "\n".join(rows)]
    return "\n\n".join(lines) + "\n"


def _package_order(name: str) -> tuple[bool, str]:
    return name.count(".") > 0, name


def module_page(module: Module) -> str:
    """Docstring, then every public name."""
    back = link("API reference", "api/index", here=module.document)
    lines = ["---\norphan: true\n---", f"# {escape(module.name)}", f"{{.facts}}\n{back}"]
    lines.append(from_docstring(ast.get_docstring(module.tree) or ""))
    lines += [_definition(node, module.name) for node in module.public()]
    return "\n\n".join(lines) + "\n"


def _definition(node: Definition, module: str) -> str:
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    body = [fence(signature(node), "python"), from_docstring(ast.get_docstring(node) or "")]
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                docstring = from_docstring(ast.get_docstring(method) or "")
                body += [fence(signature(method), "python"), docstring]
    text = "\n\n".join(part for part in body if part)
    # The directive makes the name searchable and linkable; the signature stands in its body,
    # because shapes such as Float[Tensor, "B H L D"] are no types that Sphinx could link.
    return (
        f"## {escape(node.name)}\n\n"
        f"::::{{py:{kind}}} {module}.{node.name}\n:no-contents-entry:\n\n{text}\n::::"
    )


def signature(node: Definition) -> str:
    """The definition's head as it is in the source, one argument a line if it is long."""
    decorators = [f"@{ast.unparse(item)}" for item in node.decorator_list]
    decorators = [line for line in decorators if line.startswith(("@dataclass", "@property", "@c"))]
    if isinstance(node, ast.ClassDef):
        return "\n".join([*decorators, _class_head(node)])
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"def {node.name}({ast.unparse(node.args)}){returns}"
    if len(line) > 72:
        arguments = "".join(f"    {argument},\n" for argument in _arguments(node.args))
        line = f"def {node.name}(\n{arguments}){returns}"
    return "\n".join([*decorators, line])


def _class_head(node: ast.ClassDef) -> str:
    """Name and bases, then what an instance is made from: the fields or ``__init__``."""
    bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    made_from = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]
    made_from += [signature(item) for item in node.body if getattr(item, "name", "") == "__init__"]
    inner = "".join("\n    " + text.replace("\n", "\n    ") for text in made_from)
    return f"class {node.name}{bases}" + (f":{inner}" if inner else "")


def _arguments(arguments: ast.arguments) -> list[str]:
    """The arguments one by one, with ``*`` and ``/`` where they stand."""
    positional = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    written = [_argument(*pair) for pair in zip(positional, defaults, strict=True)]
    if arguments.posonlyargs:
        written.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        written.append("*" + _argument(arguments.vararg, None))
    elif arguments.kwonlyargs:
        written.append("*")
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    written += [_argument(*pair) for pair in pairs]
    if arguments.kwarg:
        written.append("**" + _argument(arguments.kwarg, None))
    return written


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    equals = " = " if argument.annotation else "="
    return f"{argument.arg}{annotation}" + (f"{equals}{ast.unparse(default)}" if default else "")
