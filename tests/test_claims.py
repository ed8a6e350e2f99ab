"""Published claims: read strictly, answered by one record each, judged by the figures alone, and on the page."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel.commands import bench_actions, bench_methods, bench_steps, bench_training, reproduce
from dit_accel.commands.arguments import method_call
from dit_accel.commands.bench import all_cases
from dit_accel.commands.stages import ARCHIVED, STAGES
from dit_accel.eval.claims.answers import PENDING, Answered, answer_of, selected, verdict
from dit_accel.eval.claims.formulas import FORMULAS, Answer, Found, Row, figure
from dit_accel.eval.claims.page import headline_page
from dit_accel.eval.claims.schema import Claim, Claims, Embedded, Ours, Published, Setting, load_claims

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "eval" / "results"
CLAIMS = load_claims()
ANSWERED = [claim for claim in CLAIMS.claims if claim.ours is not None]
CUDA = torch.device("cuda")


def call_row(operator: str, seconds: float, **changes: Any) -> dict[str, Any]:
    """A row of `bench methods` whose best dense kernel takes one second."""
    row = {
        "case": "a case",
        "operator": operator,
        "density": 0.1,
        "seconds": seconds,
        "graph_seconds": seconds / 2,
        "speedup": 1 / seconds,
        "best_dense": "fast",
        "rounds": 5,
        "refused": None,
        "machine": {"cpu": "a processor", "gpu": "1 x NVIDIA H200"},
    }
    return row | changes


OURS = Ours("calls.jsonl", {"case": "a case", "operator": "sparse"}, "speedup", "slow")
CLAIM = Claim(
    id="a-claim",
    method="radial",
    kind="attention",
    says="a call",
    paper="0000.00000",
    where="a table",
    read="paper",
    setting=Setting(model="a model", hardware="H100"),
    published=Published(10.0, "times"),
    ours=OURS,
)


@pytest.fixture(scope="module")
def page() -> str:
    return headline_page(CLAIMS, RESULTS)


def test_the_page_is_what_the_records_give(page: str) -> None:
    written = (ROOT / "docs" / "headline.md").read_text()
    assert page == written, "run `dit-accel report --headline` and look at what changed"


def test_every_claim_stands_on_the_page(page: str) -> None:
    for claim in CLAIMS.claims:
        assert claim.says in page
        assert claim.ours is not None or claim.unchecked in page


def test_the_short_table_has_one_line_for_each_method(page: str) -> None:
    lines = [line for line in page.splitlines() if "](#" in line]
    assert [line.split("`")[1] for line in lines] == list(CLAIMS.titles)


def cases_of_stages() -> dict[str, set[tuple[Any, ...]]]:
    """Stage -> what of a row its benchmark measures on a GPU."""
    training = {
        (setting.side, setting.mode, method) for setting in bench_training.settings(CUDA) for method in setting.methods
    }
    return {
        "kernels": {(case.name, "gluon") for case in all_cases(CUDA) if case.quick},
        "methods": {(setting.name, setting.operator) for setting in bench_methods.settings(CUDA)},
        "actions": {
            (name, action) for name in bench_actions.modules(CUDA, torch.bfloat16) for action in bench_actions.ACTIONS
        },
        "steps": {
            (setting.name, method_call(method))
            for setting in bench_steps.settings(CUDA, quick=False)
            for method in bench_steps._sparse(setting)
        },
        "training": training,
    }


def test_every_claim_asks_for_a_row_that_its_stage_measures() -> None:
    known, cases = cases_of_stages(), {stage.name: stage.cases for stage in STAGES}
    assert len(ANSWERED) > 50
    for claim in ANSWERED:
        assert claim.ours is not None
        stage = CLAIMS.stages[claim.ours.record]
        assert tuple(claim.ours.select.values()) in known[stage], claim.id
        names = cases[stage]
        assert names is None or claim.ours.select.get("case", "training") in {*names(), "training"}, claim.id


def test_every_record_is_made_by_its_stage_and_stands_where_the_page_looks_for_it() -> None:
    used = {claim.ours.record for claim in ANSWERED if claim.ours is not None}
    used |= {entry.record for entry in CLAIMS.embedded}
    assert used == CLAIMS.stages.keys()
    made = {record: stage.name for stage in STAGES for record in stage.records}
    assert {record: made.get(record) for record in used} == CLAIMS.stages
    assert {entry.archived for entry in CLAIMS.embedded} <= {"", *ARCHIVED}


@pytest.mark.parametrize("record", CLAIMS.stages)
def test_every_command_is_one_that_the_command_line_takes(record: str) -> None:
    program, name, *arguments = shlex.split(CLAIMS.command(record))
    assert (program, name) == ("dit-accel", "reproduce")
    parser = argparse.ArgumentParser(exit_on_error=False)
    reproduce.add_arguments(parser)
    assert parser.parse_args(arguments).only == [CLAIMS.stages[record]]


# Reading

SMALL = """\
titles: {radial: Radial attention}
stages: {calls.jsonl: steps, eval.jsonl: suite}
differences: {half: Other numbers.}
claims:
  - id: first
    method: radial
    kind: attention
    headline: true
    says: a call
    paper: "0000.00000"
    where: a table
    read: paper
    setting: {model: a model, tokens: 100, steps: 50, dense_steps: 12.5}
    published: {value: 2.5, unit: times, note: 5 s to 2 s}
    ours: {record: calls.jsonl, select: {case: a case}, formula: run_speedup}
    differs: [half]
  - id: second
    method: radial
    kind: quality
    says: PSNR
    paper: "0000.00000"
    where: a table
    read: notes
    setting: {model: a model}
    published: {value: 30, unit: dB}
    unchecked: No weights.
embedded:
  - {method: radial, call: radial(), record: eval.jsonl, select: {item.role: method}, archived: old.jsonl}
"""


def load(tmp_path: Path, text: str) -> Claims:
    (tmp_path / "claims.yaml").write_text(text)
    return load_claims(tmp_path / "claims.yaml")


def test_a_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    loaded = load(tmp_path, SMALL)
    first, second = loaded.claims
    assert first.setting == Setting("a model", tokens=100, steps=50, dense_steps=12.5)
    assert first.published == Published(2.5, "times", "5 s to 2 s")
    assert first.ours == Ours("calls.jsonl", {"case": "a case"}, "run_speedup")
    assert loaded.command("calls.jsonl") == "dit-accel reproduce --only steps"
    assert (first.differs, first.headline, first.unchecked) == (("half",), True, "")
    assert loaded.embedded == (Embedded("radial", "radial()", "eval.jsonl", {"item.role": "method"}, "old.jsonl"),)
    assert (second.ours, second.unchecked, second.headline) == (None, "No weights.", False)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: quality", "kid: quality", r"claims\[1\].kid is not known; did you mean kind"),
        ("tokens: 100", "token: 100", r"claims\[0\].setting.token is not known; did you mean tokens"),
        ("kind: quality", "kind: qualities", "kind must be one of .* did you mean quality"),
        ("    kind: quality\n", "", r"claims\[1\].kind is missing"),
        ("read: notes", "read: note", "did you mean notes"),
        ("method: radial\n    kind: quality", "method: radal\n    kind: quality", "did you mean radial"),
        ("record: eval.jsonl", "record: evil.jsonl", "did you mean eval.jsonl"),
        ("formula: run_speedup", "formula: run_speed", "did you mean run_speedup"),
        ("steps: 50, dense_steps: 12.5}", "steps: 50}", "must have steps and dense_steps"),
        ("unit: times", "unit: ms", "must be in times, as run_speedup is, got ms"),
        ("    headline: true\n", "", "one headline of radial, got 0"),
        ("differs: [half]", "differs: [haf]", "did you mean half"),
        ("    differs: [half]\n", "", "holds half, which no claim refers to"),
        ("id: second", "id: first", "repeats"),
        ("    unchecked: No weights.\n", "", "either ours or unchecked"),
        ("    differs: [half]", "    differs: [half]\n    unchecked: No weights.", "either ours or unchecked"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert SMALL.count(old) == 1
    with pytest.raises(ValueError, match=message):
        load(tmp_path, SMALL.replace(old, new))


# Records


def answer(*rows: Row) -> Answered | str:
    return answer_of(CLAIM, OURS, {"calls.jsonl": rows})


def test_no_record_is_no_answer_and_of_two_the_newest_is_read_with_its_own_run() -> None:
    row = call_row("sparse", 0.1)
    assert answer() == answer(row | {"operator": "another"}) == PENDING
    new, old = {"created": "2026-02-01"}, {"created": "2026-01-31"}
    rows = [
        call_row("sparse", 0.1, **new),
        call_row("slow", 2.0, **new),
        call_row("slow", 9.0, **old),
        call_row("sparse", 0.5, **old),
    ]
    for order in (rows, rows[::-1]):
        found = answer(*order)
        assert isinstance(found, Answered)
        assert (found.answer.value, found.answer.beside_paper) == (pytest.approx(10), pytest.approx(20))


def test_a_record_without_a_figure_gives_the_reason() -> None:
    assert answer(call_row("sparse", 0.1, refused="it failed")) == "no figure: it failed"
    assert answer(call_row("sparse", 0.1, speedup=None)) == "no figure: the record has no speedup"


def test_fields_are_compared_inside_mappings_and_may_be_required_to_be_absent() -> None:
    rows = [{"options": {"tile": [1, 8, 8]}}, {"options": {"tile": [1, 8, 8], "sink": True}}]
    assert selected(rows, {"options.tile": (1, 8, 8)}, "") == [0, 1]
    assert selected(rows, {"options.tile": (1, 8, 8), "options.sink": None}, "") == [0]
    with pytest.raises(ValueError, match=r"options\.tiles, which no line there has"):
        selected(rows, {"options.tiles": 3}, "a file")


def compute(formula: str, found: Found) -> Answer:
    answer = FORMULAS[formula].compute(found)
    assert isinstance(answer, Answer)
    return answer


def test_the_papers_kernel_is_that_of_the_same_case_wherever_its_row_stands() -> None:
    rows = [call_row("slow", 7.0, case="another"), call_row("sparse", 0.1), call_row("slow", 2.0)]
    for order in (rows, rows[::-1]):
        answer = compute("speedup", Found(rows[1], order, baseline="slow"))
        assert answer.value == pytest.approx(10)
        assert answer.bound == pytest.approx(10)
        assert answer.beside_paper == pytest.approx(20)
    assert compute("graph_speedup", Found(rows[1], rows)).value == pytest.approx(20)
    assert compute("sparsity", Found(rows[1], rows)).value == pytest.approx(90)


def step_row(operator: str, seconds: float, density: float, **changes: Any) -> dict[str, Any]:
    """A row of `bench steps`, three quarters of whose dense step are attention."""
    row = {"attention_seconds": seconds - 1, "blocks": 2, "model_blocks": 40, "forwards": 1, "bound": 9.9}
    return call_row(operator, seconds, density=density, dense=operator.startswith("dense")) | row | changes


STEPS = (
    step_row("dense(kernel='native')", 6.0, 1.0),
    step_row("every pair", 4.0, 1.0),
    step_row("sparse", 1.6, 0.2),
    step_row("every pair", 0.5, 1.0, case="another"),
    step_row("output taken again", 0.1, 1.0, forwards=4),
)


@pytest.mark.parametrize(
    ("dense_steps", "speedup", "bound"),
    [(0, 2.5, 2.5), (50, 1.0, 1.0), (25, 2 / 1.4, 2 / 1.4)],
    ids=["none", "all", "half"],
)
def test_a_run_adds_up_its_dense_and_its_sparse_steps(dense_steps: float, speedup: float, bound: float) -> None:
    found = compute("run_speedup", Found(STEPS[2], STEPS, steps=50, dense_steps=dense_steps))
    assert (found.value, found.bound) == (pytest.approx(speedup), pytest.approx(bound))
    assert found.dense == "every pair, 4,000 ms"
    assert "2 of 40 layers" in found.detail


def test_a_plan_has_no_bound_for_it_saves_projections_too() -> None:
    plan = step_row("plan", 1.0, 0.5, bound=None)
    assert compute("run_speedup", Found(plan, (*STEPS, plan), steps=50, dense_steps=0)).bound is None


def training_row(method: str, mode: str, rate: float | None) -> dict[str, Any]:
    shared = {"side": 8, "batch": 1, "tokens": 64, "steps": 5}
    return shared | {"method": method, "mode": mode, "tokens_per_second": rate}


SPARSE_TRAINING = training_row("sparse", "compiled", 60.0)


def test_training_is_compared_with_the_fastest_dense_run_of_the_same_mode_that_has_a_rate() -> None:
    rates = [("dense(a)", "compiled", 20.0), ("dense(b)", "compiled", 30.0), ("dense(c)", "compiled", None)]
    rows = [SPARSE_TRAINING, *(training_row(*rate) for rate in [*rates, ("dense(d)", "eager", 50.0)])]
    answer = compute("training_speedup", Found(SPARSE_TRAINING, rows))
    assert (answer.value, answer.dense, answer.only) == (2.0, "dense(b), 30 tokens/s", "")


def test_training_beside_one_dense_kernel_names_it_and_beside_none_has_no_ratio() -> None:
    rows = [SPARSE_TRAINING, training_row("dense", "compiled", 30.0), training_row("dense(a)", "compiled", None)]
    answer = compute("training_speedup", Found(SPARSE_TRAINING, rows))
    assert (answer.dense, answer.only) == ("torch's choice, 30 tokens/s", "torch's choice")
    alone = Found(SPARSE_TRAINING, [SPARSE_TRAINING, training_row("dense", "compiled", None)])
    assert FORMULAS["training_speedup"].compute(alone) == "no dense run of this case has a rate"
    rate = compute("training_rate", alone)
    assert (rate.value, rate.dense) == (60.0, "")


def suite_row(number: int, method: str, seconds: float, steps: int = 8, baseline: str | None = None) -> dict[str, Any]:
    quality = {"psnr": {"value": 20.0 + number}, "clip_correct": {"value": float(number)}}
    sample = {"model": "shapes", "prompt": f"prompt {number}", "seed": number, "size": [9, 96, 128], "steps": steps}
    name = f"{method} {number} {seconds}"
    return sample | {
        "id": name,
        "method": method,
        "baseline": baseline,
        "quality": quality,
        "timings": {"denoise": seconds},
    }


ENTRY = Embedded("radial", "radial(density=0.2)", "calls.jsonl", {"method": "radial"})


def embedded_cells(folder: Path, entry: Embedded = ENTRY, **files: list[dict[str, Any]]) -> list[str]:
    """The cells of one row of the page, of files whose records are given."""
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    only = dataclasses.replace(CLAIMS, claims=(), embedded=(entry,), stages={"calls.jsonl": "suite"})
    (found,) = [line for line in headline_page(only, folder).splitlines() if "density=0.2" in line]
    return [cell.strip() for cell in found.split("|")][2:-1]


def test_a_timed_clip_is_over_the_fastest_exact_kernel_of_the_same_sample(tmp_path: Path) -> None:
    rows = [suite_row(number, "dense", 4.0) for number in (0, 1)]
    rows += [suite_row(0, "dense", 3.0), suite_row(0, "dense", 0.1, steps=7)]
    rows += [suite_row(number, "radial", 1.0, baseline=f"dense {number} 4.0") for number in (0, 1)]
    cells = embedded_cells(tmp_path, calls=rows)
    assert cells[0].startswith("2 (hash ")
    assert cells[1:5] == ["20.5 [20.0, 21.0] dB", "50%", "50%", "3.5 ×"]
    assert cells[5:] == ["`calls.jsonl`", "`dit-accel reproduce --only suite`"]
    with pytest.raises(ValueError, match="selects a prompt and seed twice"):
        embedded_cells(tmp_path, calls=[*rows, rows[-1]])


def test_seeds_of_a_prompt_count_once(tmp_path: Path) -> None:
    """Two prompts of two seeds: as wide an interval as two prompts give, not as four clips would."""
    rows = []
    for number, seed in ((0, 0), (0, 1), (1, 0), (1, 1)):
        place = {"seed": 1000 * seed + number, "item": {"number": number, "seed": seed}}
        dense = suite_row(number, "dense", 4.0) | place
        rows += [dense, suite_row(number, "radial", 1.0, baseline=dense["id"]) | place]
    cells = embedded_cells(tmp_path, calls=rows)
    assert cells[0].startswith("2 × 2 seeds (hash ")
    assert cells[1] == "20.5 [20.0, 21.0] dB"


def test_an_archived_file_is_read_until_its_successor_is_there(tmp_path: Path) -> None:
    entry = dataclasses.replace(ENTRY, archived="old.jsonl")
    old = [suite_row(0, "dense", 4.0), suite_row(0, "radial", 1.0, baseline="dense 0 4.0")]
    cells = embedded_cells(tmp_path, entry, old=old)
    assert cells[1] == "20.0 dB", "no interval of one prompt"
    assert cells[5:] == ["`old.jsonl` (archived)", "`dit-accel reproduce --only suite`"]
    new = [suite_row(1, "dense", 4.0), suite_row(1, "radial", 1.0, baseline="dense 1 4.0")]
    cells = embedded_cells(tmp_path, entry, calls=new)
    assert (cells[1], cells[5]) == ("21.0 dB", "`calls.jsonl`")


# Verdicts


@pytest.mark.parametrize(
    ("value", "beside", "hardware", "words"),
    [
        (10.0, None, "H100", "reached"),
        (9.0, None, "H100", "10 % short"),
        (9.99, None, "H100", "less than 1 % short"),
        (9.0, 11.0, "H100", "10 % short; against slow reached"),
        (8.0, 9.0, "H200", "20 % short; against slow 10 % short"),
        (99.0, None, "A100", "other hardware (A100): not comparable"),
        (99.0, None, "8 × H100", "other hardware (8 × H100): not comparable"),
        (99.0, None, "", "other hardware (not known): not comparable"),
    ],
)
def test_a_verdict_follows_from_the_figures(value: float, beside: float | None, hardware: str, words: str) -> None:
    claim = dataclasses.replace(CLAIM, setting=Setting("a model", hardware=hardware))
    found = Answered(Answer(value, "", "", "", beside_paper=beside), "NVIDIA H200")
    assert verdict(claim, OURS, found) == words


def test_a_verdict_beside_one_dense_kernel_names_it() -> None:
    assert (
        verdict(CLAIM, OURS, Answered(Answer(11.0, "", "", "", only="cuDNN"), "NVIDIA H200")) == "reached against cuDNN"
    )
    assert (
        verdict(CLAIM, OURS, Answered(Answer(9.0, "", "", "", only="cuDNN"), "NVIDIA H200"))
        == "10 % short against cuDNN"
    )


@pytest.mark.parametrize(
    ("formula", "published", "value", "words"),
    [
        ("training_rate", Published(2.0, "tokens/s"), 3.0, "other hardware (H100): not comparable"),
        ("action_time", Published(20.0, "%"), 25.0, "25 % over"),
        ("sparsity", Published(99.03, "%"), 99.034, "the same"),
        ("sparsity", Published(99.03, "%"), 98.96, "0.07 points less"),
        ("action_operations", Published(77, "%"), 76.47, "0.53 points less"),
        ("action_operations", Published(26, "%"), 25.51, "the same"),
    ],
)
def test_times_want_the_same_gpu_and_counts_none(formula: str, published: Published, value: float, words: str) -> None:
    found = Answered(Answer(value, "", "", ""), "NVIDIA H200")
    ours = dataclasses.replace(OURS, formula=formula)
    assert verdict(dataclasses.replace(CLAIM, published=published), ours, found) == words


def test_a_cpu_reaches_nothing() -> None:
    found = Answered(Answer(99.0, "", "", ""), "AMD EPYC")
    assert verdict(CLAIM, OURS, found).startswith("other hardware")


def test_figures_keep_three_digits() -> None:
    assert figure(12.345, "times") == "12.3 ×"
    assert [figure(value, "ms") for value in (999.4, 999.6, 1000.4)] == ["999 ms", "1,000 ms", "1,000 ms"]
    assert figure(659422, "tokens/s") == "659,422 tokens/s"
