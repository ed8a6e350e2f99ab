"""`dit-accel reproduce`: commands that exist, records that are whole or not there, and none that nobody makes."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_accel.cli import COMMANDS, main
from dit_accel.commands import bench, bench_methods, bench_steps, reproduce
from dit_accel.commands.arguments import method_call
from dit_accel.commands.reproduce import overview, run_stage, state_of
from dit_accel.commands.stages import ARCHIVED, STAGES, Stage
from dit_accel.eval.bench.doc_tables import BenchTable
from dit_accel.eval.claims.schema import load_claims
from dit_accel.eval.report.doc_tables import TABLES, DocTable, with_tables
from dit_accel.eval.suite.schema import load_suite

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda")
MADE = {name for stage in STAGES for name in stage.records}
EVER = float("inf")


def options_of(command: str) -> argparse.Namespace:
    """A command line as the real parser reads it."""
    program, name, *arguments = shlex.split(command.format(results="eval/results"))
    assert program == "dit-accel"
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"dit_accel.commands.{COMMANDS[name].module}").add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_command_is_one(stage: Stage) -> None:
    for command in stage.commands:
        options = options_of(command)
        if hasattr(options, "suite"):
            suite = load_suite(options.suite)
            assert all(pattern.startswith(f"runs/{suite.name}/") for pattern in stage.records.values())
        if getattr(options, "output", None) and options.output.suffix == ".jsonl":
            assert [*stage.records.values()] == [str(options.output)]


def stage_named(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def asked(stage: str) -> list[str]:
    return [options_of(command).cases for command in stage_named(stage).commands]


def test_commands_in_parts_measure_every_case_once() -> None:
    methods = [setting.name for setting in bench_methods.settings(GPU)]
    assert {sum(text in name for text in asked("methods")) for name in methods} == {1}
    kernels = [case.name for case in bench.all_cases(GPU) if case.quick]
    assert {sum(text in name for text in asked("kernels")) for name in kernels} == {0, 1}


def test_names_are_unique_and_stages_come_after_what_they_need() -> None:
    names = [stage.name for stage in STAGES]
    assert len(set(names)) == len(names)
    assert len(MADE) == sum(len(stage.records) for stage in STAGES)
    assert all(names.index(name) < names.index(stage.name) for stage in STAGES for name in stage.after)


def test_every_record_here_is_made_or_archived_with_a_reason() -> None:
    here = {file.name for file in (ROOT / "eval" / "results").iterdir() if not file.name.startswith(".")}
    assert here <= MADE | ARCHIVED.keys()
    assert ARCHIVED.keys() <= here, "only what is there can be kept"
    assert not MADE & ARCHIVED.keys()
    assert all(ARCHIVED.values())


def test_every_record_that_docs_name_is_made_or_archived() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {name for page in pages for name in re.findall(r"eval/results/([\w.-]+\.jsonl?)", page.read_text())}
    assert named <= MADE | ARCHIVED.keys()


def test_every_record_that_a_claim_names_is_made_by_the_stage_beside_it() -> None:
    claims = load_claims()
    named = {claim.ours.record for claim in claims.claims if claim.ours is not None}
    named |= {entry.record for entry in claims.embedded}
    assert all(name in stage_named(claims.stages[name]).records for name in named)
    assert {entry.archived for entry in claims.embedded} <= {"", *ARCHIVED}


def test_every_table_is_of_records_that_the_stage_it_names_makes(tmp_path: Path) -> None:
    (tmp_path / "eval" / "results").mkdir(parents=True)
    for name, table in TABLES.items():
        empty = with_tables(
            f"<!-- table {name}: made by dit-accel report --tables -->\n<!-- end of table -->", tmp_path
        )
        if isinstance(table, (DocTable, BenchTable)):
            made = table.sources[0].records if isinstance(table, DocTable) else table.records
            earlier = table.sources[1:] if isinstance(table, DocTable) else ()
            assert made in stage_named(table.stage).records
            assert {source.records for source in earlier} <= ARCHIVED.keys(), "what is made is to be read first"
            assert f"*Not measured yet; `dit-accel reproduce --only {table.stage}` does.*" in empty
        else:
            assert name == "headline" and "not measured yet" in empty


def test_what_claims_select_is_measured() -> None:
    measured = {
        "steps-h200.jsonl": {
            (setting.name, method_call(method))
            for setting in bench_steps.settings(GPU, quick=False)
            for method in bench_steps._sparse(setting)
        },
        "methods-h200.jsonl": {(setting.name, setting.operator) for setting in bench_methods.settings(GPU)},
        "bench-h200.jsonl": {(case.name, "gluon") for case in bench.all_cases(GPU) if case.quick},
    }
    ours = [claim.ours for claim in load_claims().claims if claim.ours is not None]
    asked = [
        (answer.record, answer.select["case"], answer.select["operator"])
        for answer in ours
        if answer.record in measured
    ]
    assert len({record for record, _, _ in asked}) == 3
    assert [(record, case, name) for record, case, name in asked if (case, name) not in measured[record]] == []


def test_records_that_lack_a_case_are_not_done(tmp_path: Path) -> None:
    stage = replace(stage_of(), cases=lambda: ["one", "two"])
    file = tmp_path / "tried.jsonl"
    assert state_of(stage, tmp_path) == "missing"
    file.write_text('{"case": "one"}\n{"case": "one"}\n')
    assert state_of(stage, tmp_path) == "incomplete" and state_of(replace(stage, cases=None), tmp_path) == "done"
    file.write_text('{"case": "two"}\n{"case": "one"}\n{"case": "and more"}\n')
    assert state_of(stage, tmp_path) == "done"


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage.cases], ids=lambda stage: stage.name)
def test_the_cases_of_a_stage_are_what_its_commands_measure(stage: Stage) -> None:
    assert stage.cases is not None
    names, found = [*stage.cases()], asked(stage.name)
    assert all(any(text in name for text in found) for name in names)
    assert all(any(text in name for name in names) for text in found)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands that are Python, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "_process", lambda command: [sys.executable, "-c", command])
    return tmp_path / "results"


def append(text: str) -> str:
    return f"print({text!r}, file=open('out.jsonl', 'a'))"


def stage_of(*commands: str, **changes: object) -> Stage:
    return Stage("tried", commands, {"tried.jsonl": "out.jsonl"}, "cpu", 1, **changes)  # type: ignore[arg-type]


def test_records_of_several_commands_are_joined_in_order(results: Path) -> None:
    stage = stage_of(append("first"), append("second"))
    assert state_of(stage, results) == "missing"
    assert run_stage(stage, results, EVER) == "done"
    assert (results / "tried.jsonl").read_text() == "first\nsecond\n"
    assert state_of(stage, results) == "done" and [file.name for file in results.iterdir()] == ["tried.jsonl"]


@pytest.mark.parametrize("resumes", [True, False], ids=["goes on", "begins anew"])
def test_a_stage_that_broke_off_leaves_no_record_and_ends_the_next_time(results: Path, resumes: bool) -> None:
    broken = f"{append('half')}; import pathlib; assert pathlib.Path('../fixed').exists()"
    stage = stage_of(append("first"), broken, resumes=resumes)
    reason = run_stage(stage, results, EVER)
    assert reason.startswith("failed: exit code 1")
    assert not results.exists() and state_of(stage, results) == "begun"
    Path("outputs/reproduce/unfinished/tried/fixed").touch()
    assert run_stage(stage, results, EVER) == "done"
    assert (results / "tried.jsonl").read_text() == "first\n" + "half\n" * (2 if resumes else 1)


def test_compact_records_lose_the_values_of_frames_alone(results: Path) -> None:
    scores = {"psnr": {"value": 30.0, "values": [29.0, 31.0]}, "attention_error": {"value": 0.1, "values": [0.1, 0.1]}}
    record = {"id": "a", "quality": scores}
    code = f"print({json.dumps(record)!r}, file=open('out.jsonl', 'w'))".replace("{", "{{").replace("}", "}}")
    assert run_stage(stage_of(code, compact=True), results, EVER) == "done"
    (kept,) = map(json.loads, (results / "tried.jsonl").read_text().splitlines())
    scores["psnr"]["values"] = []
    assert kept == record


def test_the_tables_are_made_by_a_command() -> None:
    assert options_of(reproduce.REPORT).tables


def test_a_command_that_leaves_nothing_is_a_failure(results: Path) -> None:
    assert run_stage(stage_of("pass"), results, EVER) == (
        "failed: a command left no out.jsonl, in outputs/reproduce/unfinished/tried"
    )


def test_a_command_that_leaves_nothing_hides_behind_no_other(results: Path) -> None:
    stage = stage_of("pass", "print('{{}}', file=open('a.jsonl', 'w')); print('{{}}', file=open('b.jsonl', 'w'))")
    said = run_stage(replace(stage, records={"tried.jsonl": "*.jsonl"}), results, EVER)
    assert said.startswith("failed: a command left no *.jsonl")


def row(case: str, refused: str | None = None, dense: bool = False) -> str:
    """A command that leaves a row of a benchmark, and ends as one with a method that failed does."""
    line = json.dumps({"case": case, "operator": "one", "dense": dense, "refused": refused})
    return f"{append(line)}; raise SystemExit({int(bool(refused) and not dense)})".replace("{", "{{").replace("}", "}}")


def test_a_refused_method_costs_no_stage(results: Path) -> None:
    stage = stage_of(row("a", "out of memory"), row("b", "no mask", dense=True), cases=lambda: ["a", "b"])
    assert run_stage(stage, results, EVER) == "done\n- a, one: out of memory"
    assert state_of(stage, results) == "done" and len((results / "tried.jsonl").read_text().splitlines()) == 2


def test_a_case_that_has_no_row_costs_its_stage_and_not_the_others(results: Path) -> None:
    stage = stage_of(row("a", "out of memory"), row("b"), cases=lambda: ["a", "b", "c"])
    assert run_stage(stage, results, EVER).startswith("failed: exit code 1")
    assert state_of(stage, results) == "begun" and not results.exists()
    assert Path("outputs/reproduce/unfinished/tried/1/out.jsonl").exists(), "the second command has run"


@pytest.mark.parametrize("through", [True, False], ids=["through", "killed"])
def test_a_suite_with_failures_is_taken_when_it_is_through(results: Path, through: bool) -> None:
    failure = json.dumps({"setting": "small", "method": "radial", "error": "out of memory"})
    code = f"{append('{}')}; print({failure!r}, file=open('failures.jsonl', 'w'))".replace("{", "{{").replace("}", "}}")
    closed = "; open('summary.md', 'w').close()" if through else ""
    stage = stage_of(f"{code}{closed}; raise SystemExit(1)", resumes=True, closing="summary.md")
    said = run_stage(stage, results, EVER)
    assert said == "done\n- small, radial: out of memory" if through else said.startswith("failed: exit code 1")
    assert (state_of(stage, results) == "done") is through


def test_an_earlier_end_of_a_suite_does_not_count(results: Path) -> None:
    stage = stage_of("raise SystemExit(1)", resumes=True, closing="summary.md")
    folder = Path("outputs/reproduce/unfinished/tried/0")
    folder.mkdir(parents=True)
    (folder / "summary.md").touch()
    assert run_stage(stage, results, EVER).startswith("failed: exit code 1")


def test_without_time_only_what_can_go_on_is_begun_and_it_is_stopped(results: Path) -> None:
    whole = stage_of(append("whole"))
    assert run_stage(whole, results, time.monotonic() + 30) == "no time is left; run the same command to go on"
    assert state_of(whole, results) == "missing"
    slow = f"{append('begun')}; import time; time.sleep(60)"
    begin = time.monotonic()
    stopped = run_stage(stage_of(slow, resumes=True), results, begin + 2)
    assert stopped == "stopped in time; run the same command to go on" and time.monotonic() - begin < 30
    assert state_of(stage_of(slow), results) == "begun" and not results.exists()


def test_processor_stages_see_no_gpu(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    code = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']), file=open('out.jsonl', 'w'))"
    assert run_stage(stage_of(code), results, EVER) == "done"
    assert (results / "tried.jsonl").read_text() == "''\n"
    assert "CUDA_VISIBLE_DEVICES= " in overview([stage_of("dit-accel compare")], Path("elsewhere"))


def test_the_command_runs_what_it_can_and_ends_with_the_tables(
    results: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = Stage("plan", (append("a plan"),), {"plan.json": "out.jsonl"}, "cpu", 1)
    reader = Stage(
        "reader",
        ("open('out.jsonl', 'w').write(open('{results}/plan.json').read())",),
        {"reader.jsonl": "out.jsonl"},
        "cpu",
        1,
        after=("plan",),
    )
    on_gpu = Stage("on-gpu", (append("fast"),), {"gpu.jsonl": "out.jsonl"}, "gpu", 1)
    monkeypatch.setattr(reproduce, "STAGES", (on_gpu, plan, reader))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tables = "print('tables')"
    monkeypatch.setattr(
        reproduce,
        "_process",
        lambda command: [
            sys.executable,
            "-c",
            tables if command == reproduce.REPORT else command,
        ],
    )
    Path("docs").mkdir()
    Path("README.md").touch()
    results = Path("eval/results")
    arguments = ["reproduce"]
    assert main([*arguments, "--only", "reader"]) == 0
    assert "reader: left out, it needs the records of plan" in capfd.readouterr().out
    assert main(arguments) == 0
    printed = capfd.readouterr().out
    assert "on-gpu: left out, it needs an NVIDIA GPU" in printed and printed.endswith("tables\n")
    assert "to do: about 1 minutes on an H200 and 0 on two processor cores" in printed
    assert (results / "reader.jsonl").read_text() == "a plan\n" and not (results / "gpu.jsonl").exists()
    (results / "plan.json").unlink()
    assert main([*arguments, "--dry-run"]) == 0
    printed = capfd.readouterr().out
    assert re.search(r"plan .*missing", printed) and re.search(r"reader .*done", printed)
    assert not (results / "plan.json").exists() and "tables" not in printed


def test_unknown_stages_and_no_time_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["reproduce", "--only", "everything"])
    assert main(["reproduce", "--minutes", "0"]) == 2
    assert "--minutes must be above 0" in capsys.readouterr().err


def test_stages_of_one_device_alone(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["reproduce", "--dry-run", "--results", str(results), "--device"]
    for device in ("gpu", "cpu"):
        assert main([*arguments, device]) == 0
        printed = capsys.readouterr().out
        assert all((f"| {stage.name} " in printed) is (stage.device == device) for stage in STAGES)
    assert main([*arguments, "gpu", "--only", "tune"]) == 2
    assert "tune: of these none is for --device gpu" in capsys.readouterr().err


def test_records_elsewhere_make_no_tables_and_those_in_place_want_a_checkout(
    results: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "STAGES", (stage_of(append("a line")),))
    assert main(["reproduce"]) == 2
    assert "is no checkout of dit_accel" in capfd.readouterr().err
    assert not Path("outputs").exists()
    assert main(["reproduce", "--results", str(results)]) == 0
    assert "tables are of eval/results alone" in capfd.readouterr().out
    assert (results / "tried.jsonl").read_text() == "a line\n"


def test_the_page_says_how_long_it_takes() -> None:
    page = (ROOT / "docs" / "reproduce.md").read_text()
    minutes = {device: sum(stage.minutes for stage in STAGES if stage.device == device) for device in ("gpu", "cpu")}
    assert f"{minutes['gpu']:g} minutes on one H200" in page and f"{minutes['cpu']:g} on two processor cores" in page
    assert all(f"`{name}`" in page for name in ARCHIVED)
