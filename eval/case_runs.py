"""Runs random cases, each a function of its seed, in processes of their own, and writes one record per case.

The first line of the file holds the facts of the machine, the last one the totals. Seeds come in families that share
all that kernels are compiled for. A seed is a case: ``--first 4711 --cases 1`` runs one again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dit_accel.eval.machine import machine, source_version, versions
from dit_accel.eval.row_check import Outcome

Record = dict[str, Any]
RecordOf = Callable[[int], Record]  # of a seed
# Rows of a gradient may be off by three times dense attention's, as in flash-attention's own tests: the kernels'
# output, rounded to 16 bits, enters them once more.
GRADIENT_ROWS = 3.0
ERRORS = ("error", "dense_error", "row_error", "dense_row_error")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN, or the largest integer, so that what a kernel forgets to write shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deterministic mode warns of operations that have no such form
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def judged_record(row: Record, run: Callable[[], tuple[Outcome, Outcome | None]]) -> Record:
    """``row`` with the outcomes of forward and gradients; a case that raises has failed, with what it raised."""
    try:
        forward, gradients = run()
    except Exception as error:  # a kernel may fail in any way, and the record is to say so
        return row | {"passed": False, "raised": f"{type(error).__name__}: {str(error).strip()[:400]}"}
    row = row | asdict(forward) | {"passed": forward.every_row_passed()}
    if gradients is not None:
        row |= {f"gradient_{name}": getattr(gradients, name) for name in ERRORS}
        row["passed"] = forward.every_row_passed() and gradients.every_row_passed(GRADIENT_ROWS)
    return row


def run_family(seeds: range, record_of: RecordOf, deadline: float) -> list[Record]:
    """Cases that share their kernels; none that would start after ``deadline``, nor after a fault of the GPU."""
    torch.set_num_threads(1)
    rows: list[Record] = []
    for seed in seeds:
        if time.time() > deadline or (rows and "raised" in rows[-1]):
            break
        rows.append(record_of(seed))
    return rows


def families_of(seeds: range, size: int) -> list[range]:
    """The seeds cut where a family of ``size`` ends."""
    cuts = [seeds.start, *range((seeds.start // size + 1) * size, seeds.stop, size), seeds.stop]
    return [range(first, end) for first, end in itertools.pairwise(cuts)]


def run_all(families: Sequence[range], record_of: RecordOf, processes: int, seconds: float) -> Iterator[list[Record]]:
    """The records of families as they finish, each in a process of its own: a GPU's fault ends with its process."""
    deadline = time.time() + seconds
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "dit_accel.eval.case_runs"])
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        running = {pool.submit(run_family, family, record_of, deadline): family for family in families}
        for done in as_completed(running):
            error = done.exception()
            lost = {"seed": running[done].start, "passed": False, "raised": repr(error)}
            yield [lost] if error else done.result()


def summary_of(rows: list[Record], asked: int) -> Record:
    """Totals, and each backend's worst errors as multiples of those of torch's dense attention."""
    worst: dict[str, float] = {}
    for row, gradient, part in itertools.product(rows, ("", "gradient_"), ("", "row_")):
        dense = row.get(f"{gradient}dense_{part}error", 0.0)
        if dense > 1e-5:  # of float32 nothing but the order of summation is left
            name = " ".join([*(row[key] for key in ("operator", "backend") if key in row), f"{gradient}{part}error"])
            worst[name] = max(worst.get(name, 0.0), round(row[f"{gradient}{part}error"] / dense, 3))
    failed = [row["seed"] for row in rows if not row["passed"]]
    passed = len(rows) - len(failed)
    return {"asked": asked, "passed": passed, "failed": failed, "not_run": asked - len(rows), "over_dense": worst}


def parser_of(description: str | None, cases: int) -> argparse.ArgumentParser:
    """The options of every such command; ``cases`` is the default number of seeds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; rewritten")
    parser.add_argument("--cases", type=int, default=cases, help=f"how many seeds (default {cases})")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the GPU (default 1)")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no case after this long (default 600)")
    return parser


def write_records(
    options: argparse.Namespace, families: Sequence[range], record_of: RecordOf, unavailable: dict[str, str]
) -> int:
    """Run the families, write the file; 1 if a case failed or none ran, else 0."""
    started, rows = time.time(), []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w") as file:
        head = {"machine": machine(), "versions": versions(), "source": source_version(), "unavailable": unavailable}
        file.write(json.dumps(head) + "\n")
        for finished in run_all(families, record_of, options.processes, options.seconds):
            for row in finished:
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                if not row["passed"]:
                    print("FAILED", json.dumps(row)[:600], flush=True)
            file.flush()
        summary = summary_of(rows, sum(map(len, families))) | {"seconds": round(time.time() - started)}
        file.write(json.dumps({"summary": summary}) + "\n")
    print(json.dumps(summary))
    return 1 if summary["failed"] or not rows else 0
