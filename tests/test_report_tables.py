"""Tables of README.md and docs/ say what the records say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dit_accel.eval.report.doc_tables import TABLES, make_table, rewrite_tables, with_tables
from dit_accel.eval.studies import RUN_OPTIONS

ROOT = Path(__file__).parents[1]
EARLIER = "quality-shapes-h200.jsonl"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = "<!-- table {}: made by dit-accel report --tables -->\n{}<!-- end of table -->"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_what_their_records_give(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert with_tables(text, ROOT) == text, "run dit-accel report --tables"
    marks = (
        text.count(mark) for mark in ("<!-- table ", ": made by dit-accel report --tables -->", "<!-- end of table")
    )
    assert len(set(marks)) == 1, "every table begins and ends"


def test_every_table_is_on_some_page() -> None:
    shown = re.findall(r"<!-- table ([\w-]+):", "".join(page.read_text(encoding="utf-8") for page in PAGES))
    assert sorted(shown) == sorted(TABLES)


@pytest.fixture
def quality_third(tmp_path: Path) -> Callable[[], str]:
    """The table of a checkout that has only the records of earlier versions, and how they are read there."""
    (tmp_path / "eval" / "results").mkdir(parents=True)
    shutil.copy(ROOT / "eval" / "results" / EARLIER, tmp_path / "eval" / "results")
    return lambda: make_table(TABLES["quality-third"], tmp_path)


def test_a_table_says_how_many_prompts_it_is_of_by_which_machine_and_where_its_records_are(
    quality_third: Callable[[], str],
) -> None:
    table = quality_third()
    assert "48 prompts (hash " in table
    assert "; 1 x NVIDIA H200; `eval/results/quality-shapes-h200.jsonl`, runs of earlier versions" in table


def test_records_of_the_suite_take_the_place_of_earlier_ones(tmp_path: Path, quality_third: Callable[[], str]) -> None:
    before = quality_third()
    lines = (ROOT / "eval" / "results" / EARLIER).read_text(encoding="utf-8").splitlines()
    recorded = [dict(TABLES["quality-third"].sources[1].unsaid) | json.loads(line) for line in lines]
    both = [record for record in recorded if record["run"].startswith("equal density")]
    floor = both[0] | {"id": "floor", "baseline": both[0]["id"], "role": "floor"}
    successor = tmp_path / "eval" / "results" / "suite-quality-h200.jsonl"
    successor.write_text("".join(json.dumps(of_suite(record)) + "\n" for record in [*both, floor]))
    after = quality_third()
    rows = [line.split() for line in before.splitlines() if line.startswith("|")]
    assert [line.split() for line in after.splitlines() if line.startswith("|")] == rows
    assert after.endswith("; 1 x NVIDIA H200; `eval/results/suite-quality-h200.jsonl`.")
    successor.write_text("")
    assert quality_third() == before


def of_suite(record: dict[str, Any]) -> dict[str, Any]:
    """A record of earlier versions as a suite has it."""
    dense = record["method"] == "dense"
    options = {name: value for name, value in record["options"].items() if name not in RUN_OPTIONS}
    item = {"suite": "quality", "setting": "default", "label": f"{record['method']}({options})", "prompt_hash": ""}
    item |= {"role": record.pop("role", "reference" if dense else "method"), "prompt_list": "", "number": 0, "seed": 0}
    return record | {"prompt_hash": "", "item": item}


def test_without_records_the_pages_say_what_makes_them(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.png"))
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "eval" / "results").mkdir(parents=True)
    rewrite_tables(tmp_path)
    text = "".join(
        page.read_text(encoding="utf-8") for page in [tmp_path / "README.md", *tmp_path.glob("docs/**/*.md")]
    )
    assert text.count("*Not measured yet; `dit-accel reproduce --only ") == len(TABLES) - 1
    assert rewrite_tables(tmp_path) == []


def test_tables_are_made_again_and_the_rest_is_left(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "eval" / "results", tmp_path / "eval" / "results")
    (tmp_path / "docs").mkdir()
    old, new = (BLOCK.format("compare", part) for part in ("| stale |\n", make_table(TABLES["compare"], ROOT) + "\n"))
    (tmp_path / "README.md").write_text(f"before\n{old}\nbetween\n{old}\nafter\n")
    (tmp_path / "docs" / "a.md").write_text("no table\n")
    assert rewrite_tables(tmp_path) == [tmp_path / "README.md"]
    assert (tmp_path / "README.md").read_text() == f"before\n{new}\nbetween\n{new}\nafter\n"
    assert rewrite_tables(tmp_path) == []


def test_unknown_tables_and_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no table 'nonsense'; choose one of compare, "):
        with_tables(BLOCK.format("nonsense", ""), ROOT)
    with pytest.raises(ValueError, match="no checkout of dit_accel"):
        rewrite_tables(tmp_path)
