"""tools/count_signatures.py: which lines are headers of functions, which are entries of records."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "tools/count_signatures.py"
if not PATH.exists():
    pytest.skip("tools/ is not here", allow_module_level=True)
_spec = importlib.util.spec_from_file_location("count_signatures", PATH)
assert _spec is not None
assert _spec.loader is not None
count_signatures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(count_signatures)

FUNCTIONS = '''
"""def in_a_text(): is not a function"""

@decorated(
    by="a call",
)
def several_lines(
    a: dict[str, int],
    *,
    b: object = {"key": 1},
    c: object = lambda x: x,
) -> tuple[
    int, int
]:
    # a comment before the body is no part of the header
    def nested(x): return x
    return a, nested(b)

square = lambda x: x * x

class Plain:
    size: int = 0
    async def method(self) -> int:
        if self.size: pass
        return 1
'''

RECORDS = """
class Rows(NamedTuple):
    '''Text.'''
    logits: int
    options: dict[
        str, int
    ] = {}
    total = 3

    @property
    def area(self) -> int:
        inside: int = 2
        return inside

@dataclasses.dataclass(frozen=True, slots=True)
class Operator:
    name: str
    shared: ClassVar[int] = 0

@dataclass
class Holder:
    class Inner(typing.NamedTuple):
        x: int
    y: int

class Keywords(TypedDict, total=False):
    beta: float

class Plain:
    size: int
"""


def test_header_lines_end_with_the_signature():
    assert count_signatures.header_lines(FUNCTIONS) == [8, 1, 1]


def test_record_entries_are_annotated_fields_of_records_alone():
    assert sorted(count_signatures.record_entries(RECORDS)) == [1, 1, 1, 1, 2]


def test_counts_of_one_source_add_up():
    count = count_signatures.count(FUNCTIONS + RECORDS)
    assert count == (len((FUNCTIONS + RECORDS).splitlines()), 4, 11, 6)
    assert count.signatures == 17


def test_files_before_and_after_the_torch_folder(tmp_path, capsys):
    package = tmp_path / "dpo_fast"
    package.mkdir()
    for name in count_signatures.BEFORE:
        (package / f"{name}.py").write_text("def f(\n    x\n): ...\n")
    root = ["--root", str(tmp_path)]
    assert count_signatures.main(root) == 0
    total = capsys.readouterr().out.splitlines()[-1].split()
    assert total == ["total", "12", "4", "12", "0", "12"]
    assert count_signatures.main([*root, "dpo_fast/ops.py"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["total", "3", "1", "3", "0", "3"]

    (package / "_torch").mkdir()
    (package / "_torch/cpu.py").write_text("class A(NamedTuple):\n    x: int\n\ndef f(x): ...\n")
    (package / "_torch/cuda.py").write_text("")
    assert count_signatures.main(root) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["total", "4", "1", "1", "1", "2"]


@pytest.mark.parametrize(("limit", "status"), [("2", 0), ("1", 1)])
def test_more_than_the_limit_is_a_failure(tmp_path, capsys, limit, status):
    (tmp_path / "module.py").write_text("class A(NamedTuple):\n    x: int\n\ndef f(x): ...\n")
    assert count_signatures.main(["--root", str(tmp_path), "--max", limit, "module.py"]) == status
    assert ("more than 1" in capsys.readouterr().err) == bool(status)
