"""`dit-accel reproduce`: the records behind the tables made again, as many as this machine can, and then the tables."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from dit_accel.commands.stages import STAGES, Device, Stage
from dit_accel.eval.fidelity import ENTRIES
from dit_accel.eval.report.doc_tables import is_checkout
from dit_accel.eval.report.tables import format_table

RESULTS = Path("eval/results")
WORK = Path("outputs/reproduce")  # a folder of each stage that ended, and unfinished/ with those that did not
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # for what is to run on a processor
REPORT = "dit-accel report --tables --headline"
_FEW_VALUES = ENTRIES | {"border", "trajectory"}  # scores whose values are not one per frame
_PATIENCE = 30  # seconds for a command to put down its pen

State = Literal["done", "begun", "incomplete", "missing"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="folder of the records; of another one than eval/results no tables",
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help=f"of {', '.join(names)}")
    parser.add_argument("--device", choices=get_args(Device), help="only the stages for that (default both)")
    parser.add_argument("--minutes", type=float, help="stop in time: begin nothing that would take longer")
    parser.add_argument("--dry-run", action="store_true", help="say what is there and what would run, run nothing")


def run(options: argparse.Namespace) -> int:
    if options.minutes is not None and options.minutes <= 0:
        raise ValueError(f"--minutes must be above 0, got {options.minutes:g}.")
    in_place = options.results.resolve() == RESULTS.resolve()
    if in_place and not is_checkout(Path.cwd()):
        raise ValueError(
            f"{Path.cwd()} is no checkout of dit_accel, whose records and tables these are; change to one or name "
            "another folder with --results."
        )
    wanted, device = options.only or [stage.name for stage in STAGES], options.device
    stages = [stage for stage in STAGES if stage.name in wanted and stage.device == (device or stage.device)]
    if not stages:
        raise ValueError(f"{', '.join(wanted)}: of these none is for --device {device}; leave --device out.")
    if options.dry_run:
        print(overview(stages, options.results))
        return 0
    failed = _run_all(stages, options.results, time.monotonic() + 60 * (options.minutes or float("inf")))
    print(overview(stages, options.results))
    if any(state_of(stage, options.results) == "done" for stage in stages):
        if in_place:
            failed |= subprocess.run(_process(REPORT), check=False).returncode != 0
        else:
            print(f"tables are of {RESULTS} alone; for them copy the records there and run `{REPORT}`.")
    return 1 if failed else 0


def _run_all(stages: Sequence[Stage], results: Path, deadline: float) -> bool:
    """Runs what is not done, as far as it can run here and now; whether anything failed."""
    device = "gpu" if torch.cuda.is_available() else "cpu"
    failed = False
    for stage in stages:
        if state_of(stage, results) == "done":
            continue
        said = _waits(stage, results, device) or run_stage(stage, results, deadline)
        print(f"{stage.name}: {said}", flush=True)
        failed |= said.startswith("failed")
    return failed


def state_of(stage: Stage, results: Path) -> State:
    """Records are put in their place when all of a stage's commands have ended: what is there is whole."""
    if stage.is_done(results):
        return "done"
    if _unfinished(stage).exists():
        return "begun"
    return "incomplete" if any((results / name).exists() for name in stage.records) else "missing"


def overview(stages: list[Stage], results: Path) -> str:
    """A table of the stages, and the command lines of those that are not done."""
    rows = [
        {
            "stage": stage.name,
            "records": ", ".join(stage.records),
            "device": stage.device,
            "minutes": f"{stage.minutes:g}",
            "state": state_of(stage, results),
        }
        for stage in stages
    ]
    lines = [
        f"  {stage.name}: {shown(stage, command, results)}"
        for stage in stages
        if state_of(stage, results) != "done"
        for command in stage.commands
    ]
    return "\n".join([format_table(rows), _minutes_left(stages, results), *lines])


def _minutes_left(stages: Sequence[Stage], results: Path) -> str:
    left = dict.fromkeys(get_args(Device), 0.0)
    for stage in stages:
        left[stage.device] += 0 if state_of(stage, results) == "done" else stage.minutes
    return f"to do: about {left['gpu']:g} minutes on an H200 and {left['cpu']:g} on two processor cores"


def shown(stage: Stage, command: str, results: Path) -> str:
    """A command as a shell takes it, from this folder."""
    hidden = [f"{name}={value}" for name, value in (NO_GPU if stage.device == "cpu" else {}).items()]
    return " ".join([*hidden, command.format(results=results)])


def run_stage(stage: Stage, results: Path, deadline: float) -> str:
    """Runs the commands of a stage that have not ended yet, then puts its records in place.

    Args:
        stage: what to run.
        results: folder of the records.
        deadline: by ``time.monotonic()``; commands that can go on another time are stopped then.

    Returns:
        "done", with what was measured in vain; else why its records are not there.
    """
    failures = []
    for number, command in enumerate(stage.commands):
        folder = _folder(stage, number)
        if _ended(folder).exists():
            continue
        left = deadline - time.monotonic()
        if left <= 0 or (not stage.resumes and left < 60 * stage.minutes / len(stage.commands)):
            return "no time is left; run the same command to go on"
        if not stage.resumes:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        if stage.closing is not None:
            (folder / stage.closing).unlink(missing_ok=True)
        print(f"\n{stage.name}: {shown(stage, command, results)}", flush=True)
        command = command.format(results=os.path.relpath(results, folder))
        code = _call(_process(command), folder, stage, left if stage.resumes else None)
        if code is None:
            return "stopped in time; run the same command to go on"
        if code == 0 or (stage.closing is not None and (folder / stage.closing).exists()):
            _ended(folder).write_text(f"{code}\n")
        else:
            failures.append(f"failed: exit code {code}, in {folder}")
    parts = [part for pattern in stage.records.values() for part in chain(*_parts(stage, pattern))]
    if failures and not stage.tells_all(parts):
        return failures[0]
    return _collect(stage, results)


def _collect(stage: Stage, results: Path) -> str:
    """Joins what the commands left into the records, each file under its name at once."""
    results.mkdir(parents=True, exist_ok=True)
    said = "\n- ".join(["done", *dict.fromkeys(_in_vain(stage))])
    for name, pattern in stage.records.items():
        parts = _parts(stage, pattern)
        if not all(parts):
            return f"failed: a command left no {pattern}, in {_unfinished(stage)}"
        joined = results / f".{name}"
        lines = [line for part in chain(*parts) for line in part.read_text(encoding="utf-8").splitlines(keepends=True)]
        joined.write_text("".join(map(_compact, lines) if stage.compact else lines), encoding="utf-8")
        joined.replace(results / name)
    shutil.rmtree(WORK / stage.name, ignore_errors=True)
    _unfinished(stage).replace(WORK / stage.name)
    return said


def _parts(stage: Stage, pattern: str) -> list[list[Path]]:
    """Files that each of the commands left."""
    return [sorted(_folder(stage, number).glob(pattern)) for number in range(len(stage.commands))]


def _in_vain(stage: Stage) -> Iterator[str]:
    """What commands that ended with an error have no figure or no record of, each with the reason."""
    for number in range(len(stage.commands)):
        folder = _folder(stage, number)
        if _ended(folder).exists() and _ended(folder).read_text() == "0\n":
            continue
        if stage.closing is not None:
            for line in _rows(folder / Path(stage.closing).parent, "failures*.jsonl"):
                yield f"{line['setting']}, {line['method']}: {line['error']}"
        else:
            for row in chain(*(_rows(folder, pattern) for pattern in stage.records.values())):
                if row.get("refused") is not None and not row.get("dense"):
                    name = next(row[key] for key in ("operator", "action", "method") if key in row)
                    yield f"{row['case']}, {name}: {row['refused']}"


def _rows(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.glob(pattern)):
        yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())


def _compact(line: str) -> str:
    """A record without what its scores say of each frame."""
    record = json.loads(line)
    for name, score in record["quality"].items():
        if name not in _FEW_VALUES:
            score["values"] = []
    return json.dumps(record, ensure_ascii=False) + "\n"


def _waits(stage: Stage, results: Path, device: str) -> str | None:
    """Why a stage cannot run here and now, if it cannot."""
    if stage.device == "gpu" and device != "gpu":
        return "left out, it needs an NVIDIA GPU and torch sees none"
    missing = [name for name in stage.after if state_of(_stage(name), results) != "done"]
    return f"left out, it needs the records of {', '.join(missing)}" if missing else None


def _stage(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def _folder(stage: Stage, number: int) -> Path:
    """Where one of the commands runs."""
    return _unfinished(stage) / str(number)


def _unfinished(stage: Stage) -> Path:
    return WORK / "unfinished" / stage.name


def _ended(folder: Path) -> Path:
    return folder.with_suffix(".ended")


def _process(command: str) -> list[str]:
    """A `dit-accel` line as this interpreter runs it."""
    program, *arguments = shlex.split(command)
    assert program == "dit-accel", "what stages are made of"
    return [sys.executable, "-m", "dit_accel.cli", *arguments]


def _call(process: list[str], folder: Path, stage: Stage, seconds: float | None) -> int | None:
    """The exit code of a process in a folder; None where it was stopped after ``seconds``."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment: Mapping[str, str] = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in paths if path),
        **(NO_GPU if stage.device == "cpu" else {}),
    }
    with subprocess.Popen(process, cwd=folder, env=environment) as running:
        try:
            return running.wait(None if seconds == float("inf") else seconds)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGINT)
            try:
                running.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                running.kill()
            return None
        except BaseException:
            running.kill()
            raise
