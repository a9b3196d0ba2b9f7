"""Faults to plant in the sources: each is a function's name, a short piece of that function, and what takes its place.

They stand beside the tests that catch them, in `faults_<subject>.py`, as a list FAULTS. `tests/mutate.py` plants them.

To anchor one anew after a function has changed: say in `within` what the function is called now and in `find` a piece
that it has once. `packaging/test_faults.py` says which are to be anchored anew; it runs no fault.
"""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
Span = tuple[str, int, int]  # "Class.method", where its text begins and ends


@dataclass
class Fault:
    """name: what is wrong then; within: a function or class, with the class before it where there are several of a name
    ("Class.method"), or "" for all of the file; find: what stands there once, spaces and line ends being alike.
    """

    name: str
    file: str
    within: str
    find: str
    replace: str
    tests: str = ""  # files that must fail, "losses/test_goal ops/test_sums"; those of the subject by default
    subject: str = ""

    def plant(self, root: Path = ROOT) -> str:
        """The file's text with the fault."""
        text = (root / self.file).read_text()
        start, end = place(text, self.file, self.within, self.find)
        return text[:start] + self.replace + text[end:]

    def test_files(self, root: Path = ROOT) -> list[str]:
        """The files that must fail, from the root."""
        files = []
        for name in (self.tests or self.subject).split():
            paths = sorted((root / "tests").glob(f"**/{name}.py"))
            if not paths:
                raise LookupError(f"{self.name}: there is no tests/**/{name}.py")
            files += [str(path.relative_to(root)) for path in paths]
        return files


def place(text: str, file: str, within: str, find: str) -> tuple[int, int]:
    """Where find is; LookupError unless it is there once."""
    parts = spans(text, file) if within else [("", 0, len(text))]
    parts = [part for part in parts if f".{part[0]}".endswith(f".{within}") or not within]
    if not parts:
        raise LookupError(f"{file} has no {within}")
    pattern = re.compile(r"\s+".join(map(re.escape, find.split())))
    places = {match.span() for _, start, end in parts for match in pattern.finditer(text, start, end)}
    if len(places) != 1:
        raise LookupError(f"{within or 'all'} of {file} has {find!r} {len(places)} times")
    return places.pop()


def spans(text: str, file: str) -> list[Span]:
    """Every function and class of a Python or C++ file."""
    return list(_of_python(text) if file.endswith(".py") else _of_cpp(text))


def _of_python(text: str) -> Iterator[Span]:
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def walk(node: ast.AST, outer: str) -> Iterator[Span]:
        for child in ast.iter_child_nodes(node):
            name = outer
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{outer}.{child.name}" if outer else child.name
                yield name, starts[child.lineno - 1], starts[child.end_lineno or child.lineno]
            yield from walk(child, name)

    yield from walk(ast.parse(text), "")


_SILENT = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'", re.DOTALL)
_CLASS = re.compile(r"\b(?:class|struct|namespace|union|enum)\s+(?:alignas\(\d+\)\s*)?([A-Za-z_]\w*)")
_CALL = re.compile(r"([A-Za-z_~]\w*)\s*\(")
_NO_FUNCTION = {"if", "for", "while", "switch", "catch", "alignas", "decltype", "sizeof", "requires", "defined"}


def _of_cpp(text: str) -> Iterator[Span]:
    """By its braces: what stands before one says whether it is a function's, a class's or neither's."""
    code = _SILENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    open_blocks: list[tuple[str, int]] = []  # name or "", where it begins
    begun = depth = 0
    for at, letter in enumerate(code):
        if letter in "()":
            depth += 1 if letter == "(" else -1
        elif letter == "{":
            begins = begun + len(code[begun:at]) - len(code[begun:at].lstrip())
            open_blocks.append((_named(code[begun:at]), begins))
            begun = at + 1
        elif letter == "}" and open_blocks:
            name, begins = open_blocks.pop()
            if name:
                yield ".".join([outer for outer, _ in open_blocks if outer] + [name]), begins, at + 1
            begun = at + 1
        elif letter == ";" and depth == 0:
            begun = at + 1


def _named(header: str) -> str:
    """What the block after header defines, or ""."""
    if re.search(r"\]\s*(\([^{}]*\)[^{}]*)?$", header) and "[" in header and "[[" not in header:
        return ""  # a lambda's
    calls = [name for name in _CALL.findall(header) if not name.startswith("__")]
    if calls:
        return "" if calls[0] in _NO_FUNCTION or "=" in header.partition(calls[0])[0] else calls[0]
    named = _CLASS.findall(header)
    return named[-1] if named else ""


def all_faults(tests: Path = TESTS) -> list[Fault]:
    """Those of every `faults_<subject>.py`, in the order of the files' names."""
    faults: list[Fault] = []
    for path in sorted(tests.glob("**/faults_*.py")):
        for fault in runpy.run_path(str(path))["FAULTS"]:
            fault.subject = f"{path.parent.name}/test_{path.stem.removeprefix('faults_')}"
            faults.append(fault)
    return faults
