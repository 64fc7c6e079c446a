"""Is a kernel's test any good? Break the kernel in many small ways and see whether it notices.

A mutant is the kernel's source with one expression replaced: a mask that is always true, a wrong
stride, a rescaling left out, a bound off by one, a comparison turned round, a scale dropped.
`survivors` runs a check against each in a process of its own (a wild pointer may end it: that
counts as caught) and returns those that went unnoticed.

>>> def check():                                     # importable by the worker; raises when wrong
...     torch.testing.assert_close(vector_add(x, y), x + y)
>>> survivors("corelib.kernels.gates.demo", f"{__file__}:check", functions=["_add_kernel"])
[]
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

KINDS = ("mask", "where", "stride", "rescale", "scale", "bound", "comparison", "range")

_WORKER = "from corelib.kernels.gates.mutant_worker import serve; serve()"
_OFF_BY_ONE = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
_OFF_BY_ONE |= {ast.Eq: "!=", ast.NotEq: "=="}
_TURNED = {ast.Lt: ">", ast.LtE: ">=", ast.Gt: "<", ast.GtE: "<="}


@dataclass(frozen=True)
class Mutant:
    """One change: in ``function`` (at ``line`` of the module) ``before`` became ``after``."""

    kind: str
    function: str
    line: int
    before: str
    after: str
    start: int  # byte range of `before` in the module's source
    end: int

    @property
    def key(self) -> str:
        """What names it in a declaration of equivalent mutants; holds no line number."""
        return f"{self.function}: {self.before} -> {self.after}"

    def apply(self, source: str) -> str:
        text = source.encode()
        return (text[: self.start] + self.after.encode() + text[self.end :]).decode()

    def __str__(self) -> str:
        return f"[{self.kind}] line {self.line}, {self.key}"


@dataclass(frozen=True)
class Outcome:
    """What a check made of a mutant: ``how`` says by what it was caught."""

    mutant: Mutant
    killed: bool
    how: str


def survivors(
    module: str,
    check: str,
    *,
    kinds: Sequence[str] = KINDS,
    functions: Sequence[str] | None = None,
    limit: int | None = None,
    equivalent: Mapping[str, str] | None = None,
) -> list[Mutant]:
    """The mutants of a kernel module that ``check`` does not notice.

    Args:
        module: dotted name of the module whose kernels are changed.
        check: ``"package.module:function"`` or ``"path/to/test_file.py:function"``, without
            arguments; it raises when a result is wrong. It runs interpreted, under
            `gates.memory.memory_check`. Put the quickest and sharpest case first.
        kinds: which changes to make, of `KINDS`.
        functions: only in these kernels; every ``@jit`` function of the module by default.
        limit: at most this many, spread evenly over all.
        equivalent: `Mutant.key` -> the reason why this change alters no result.

    Raises:
        ValueError: ``equivalent`` names a mutant that does not exist or that was caught.
        RuntimeError: the check fails on the unchanged module.
    """
    equivalent = equivalent or {}
    every = mutants(_source(module), kinds=kinds, functions=functions)
    if unknown := set(equivalent) - {mutant.key for mutant in every}:
        raise ValueError(f"equivalent: no such mutants of {module}: {sorted(unknown)}")
    outcomes = outcomes_of(module, check, _spread(every, limit))
    alive = [outcome.mutant for outcome in outcomes if not outcome.killed]
    ran = {outcome.mutant.key for outcome in outcomes}
    if caught := sorted((set(equivalent) & ran) - {mutant.key for mutant in alive}):
        raise ValueError(f"equivalent: the check catches these after all: {caught}")
    return [mutant for mutant in alive if mutant.key not in equivalent]


def outcomes_of(module: str, check: str, chosen: Sequence[Mutant]) -> list[Outcome]:
    """Run ``check`` against each mutant of ``module`` (see `survivors`)."""
    if not chosen:
        return []
    path, _, name = check.rpartition(":")
    if path.endswith(".py"):
        check = f"{pathlib.Path(path).resolve()}:{name}"
    source = _source(module)
    job = {
        "module": module,
        "check": check,
        "sources": [source, *(mutant.apply(source) for mutant in chosen)],
    }
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", _WORKER],
        input=json.dumps(job),
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{check} fails on the unchanged {module}:\n{done.stderr[-4000:]}")
    answers = json.loads(done.stdout)
    return [Outcome(mutant, *answer) for mutant, answer in zip(chosen, answers, strict=True)]


def mutants(
    source: str, *, kinds: Sequence[str] = KINDS, functions: Sequence[str] | None = None
) -> list[Mutant]:
    """All mutants of the ``@jit`` functions in a module's source, in the order of the text."""
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds: expected some of {KINDS}, got {sorted(unknown)}")
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and _is_kernel(node):
            if functions is None or node.name in functions:
                found += _Finder(source, node).mutants()
    unique = {(mutant.start, mutant.end, mutant.after): mutant for mutant in found}
    ordered = sorted(unique.values(), key=lambda mutant: (mutant.start, mutant.end, mutant.after))
    return [mutant for mutant in ordered if mutant.kind in kinds]


class _Finder:
    """Finds what can be changed in one kernel."""

    def __init__(self, source: str, function: ast.FunctionDef):
        self.source, self.function = source, function
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        changed = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        self.parameters = {argument.arg for argument in function.args.args} - changed
        lengths = [len(line) for line in source.encode().splitlines(keepends=True)]
        self.line_starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]

    def mutants(self) -> Iterator[Mutant]:
        for statement in self.function.body:
            for node in ast.walk(statement):
                if isinstance(node, ast.Call):
                    yield from self._call(node)
                elif isinstance(node, ast.Compare) and len(node.ops) == 1:
                    yield from self._compare(node)
                elif isinstance(node, (ast.Assign, ast.AugAssign)):
                    yield from self._assignment(node)
                elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                    yield from self._product(node)

    def _call(self, node: ast.Call) -> Iterator[Mutant]:
        name = ast.unparse(node.func)
        if name in ("tl.load", "tl.store") or name.startswith("tl.atomic_"):
            for keyword in node.keywords:
                if keyword.arg == "mask":
                    text = self._text(keyword.value)
                    yield self._mutant("mask", keyword.value, f"(({text}) == ({text}))")
        elif name == "tl.where":
            text = self._text(node.args[0])
            yield self._mutant("where", node.args[0], f"(({text}) == ({text}))")
            yield self._mutant("where", node.args[0], f"(({text}) != ({text}))")
        elif name == "tl.cdiv":
            top, bottom = map(self._text, node.args)
            yield self._mutant("range", node, f"(({top}) // ({bottom}))")
        elif name in ("range", "tl.range"):
            step = self._text(node.args[2]) if len(node.args) > 2 else "1"
            end = node.args[min(1, len(node.args) - 1)]
            yield self._mutant("range", end, f"({self._text(end)}) - ({step})")
            if len(node.args) > 1:
                start = node.args[0]
                yield self._mutant("range", start, f"({self._text(start)}) + ({step})")

    def _compare(self, node: ast.Compare) -> Iterator[Mutant]:
        left, right = self._text(node.left), self._text(node.comparators[0])
        for kind, table in (("bound", _OFF_BY_ONE), ("comparison", _TURNED)):
            if sign := table.get(type(node.ops[0])):
                yield self._mutant(kind, node, f"({left}) {sign} ({right})")

    def _assignment(self, node: ast.Assign | ast.AugAssign) -> Iterator[Mutant]:
        """A running value multiplied by something: ``x *= y``, ``x = x * y + z``, and in a dot."""
        if isinstance(node, ast.AugAssign):
            if isinstance(node.op, ast.Mult):
                kind = "scale" if _is_scale(node.value) else "rescale"
                yield self._mutant(kind, node.value, "1.0")
            return
        targets = {name.id for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)}
        for product in ast.walk(node.value):
            if isinstance(product, ast.BinOp) and isinstance(product.op, ast.Mult):
                sides = (product.left, product.right), (product.right, product.left)
                for kept, other in sides:
                    running = isinstance(kept, ast.Name) and kept.id in targets
                    if running and not _is_scale(other):
                        yield self._mutant("rescale", product, kept.id)

    def _product(self, node: ast.BinOp) -> Iterator[Mutant]:
        for factor, other in ((node.right, node.left), (node.left, node.right)):
            if _is_scale(factor):
                yield self._mutant("scale", node, f"({self._text(other)})")
                return
            if isinstance(factor, ast.Name) and factor.id in self.parameters:
                yield self._mutant("stride", factor, f"({factor.id} + 1)")
                return

    def _mutant(self, kind: str, node: ast.expr, after: str) -> Mutant:
        start = self.line_starts[node.lineno - 1] + node.col_offset
        end = self.line_starts[node.end_lineno - 1] + node.end_col_offset
        before = " ".join(self._text(node).split())
        return Mutant(kind, self.function.name, node.lineno, before, after, start, end)

    def _text(self, node: ast.AST) -> str:
        return ast.get_source_segment(self.source, node)


def _is_scale(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and ("_scale" in node.id or node.id.startswith("scale"))


def _is_kernel(function: ast.FunctionDef) -> bool:
    names = (ast.unparse(item).partition("(")[0] for item in function.decorator_list)
    return any(name in ("jit", "triton.jit") for name in names)


def _source(module: str) -> str:
    return pathlib.Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")


def _spread(items: list[Mutant], limit: int | None) -> list[Mutant]:
    if limit is None or len(items) <= limit:
        return items
    return [items[(2 * i + 1) * len(items) // (2 * limit)] for i in range(limit)]
