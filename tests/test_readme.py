"""README.md says what the records say."""

from __future__ import annotations

from pathlib import Path

from dit_accel.eval.records import read_records
from dit_accel.eval.report import format_table, summary

ROOT = Path(__file__).parents[1]


def test_the_comparison_table_is_that_of_its_records() -> None:
    records = read_records(ROOT / "eval/results/compare-shapes-cpu.jsonl")
    table = format_table([summary(record, records[0]) for record in records])
    assert table in (ROOT / "README.md").read_text()


def test_links_point_to_files() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text()
        targets = [part.split(")")[0] for part in text.split("](")[1:]]
        missing = [
            target for target in targets if "://" not in target and not (page.parent / target.split("#")[0]).exists()
        ]
        assert not missing, f"{page.name} links to {missing}"
