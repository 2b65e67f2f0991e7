"""Counts the lines that only name arguments in the private torch modules below the public functions.

    python tools/count_signatures.py [--root CHECKOUT] [--max N] [FILE ...]

Two things are counted: the header lines of functions, from `def` to the line that ends the signature (decorators and
lambdas are not headers), and the entries of records: the annotated fields of NamedTuple, TypedDict and dataclass
classes. The files are dpo_fast/_torch/*.py, or in a checkout older than that folder the four modules that it replaced.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

BEFORE = ("ops", "_cuda_ops", "fallback", "linear_ops")
RECORDS = ("NamedTuple", "TypedDict")


class Count(NamedTuple):
    """Counts of one file, or of several added up."""

    lines: int
    functions: int
    headers: int
    entries: int

    @property
    def signatures(self) -> int:
        return self.headers + self.entries


def header_lines(source: str) -> list[int]:
    """Lines of each function's header, in order of their `def`s."""
    lines: list[int] = []
    start = depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.string == "def":
            start, depth = token.start[0], 0
        elif start and token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
            if token.string == ":" and depth == 0:
                lines.append(token.end[0] - start + 1)
                start = 0
    return lines


def _name(node: ast.expr) -> str:
    """The last part of a name: dataclass for @dataclasses.dataclass(frozen=True)."""
    if isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def record_entries(source: str) -> list[int]:
    """Number of fields of each record."""
    entries = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef):
            continue
        is_record = any(_name(base) in RECORDS for base in node.bases)
        if is_record or any(_name(decorator) == "dataclass" for decorator in node.decorator_list):
            fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
            entries.append(sum(_name(field.annotation) != "ClassVar" for field in fields))
    return entries


def count(source: str) -> Count:
    headers = header_lines(source)
    return Count(len(source.splitlines()), len(headers), sum(headers), sum(record_entries(source)))


def default_files(root: Path) -> list[Path]:
    package = root / "dpo_fast"
    if (package / "_torch").is_dir():
        return sorted((package / "_torch").glob("*.py"))
    return [package / f"{name}.py" for name in BEFORE]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="files to count instead, relative to the root")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the checkout")
    parser.add_argument("--max", type=int, help="exit with 1 when headers and entries together are more than this")
    args = parser.parse_args(argv)
    files = [args.root / file for file in args.files] or default_files(args.root)
    counts = {str(file.relative_to(args.root)): count(file.read_text(encoding="utf-8")) for file in files}
    total = Count(*map(sum, zip(*counts.values(), strict=True)))
    width = max(len(name) for name in counts)
    print(f"{'':{width}}  lines  functions  header lines  record entries  together")
    for name, c in (*counts.items(), ("total", total)):
        print(f"{name:{width}}  {c.lines:5}  {c.functions:9}  {c.headers:12}  {c.entries:14}  {c.signatures:8}")
    if args.max is not None and total.signatures > args.max:
        print(f"{total.signatures} lines of signatures and records, more than {args.max}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
