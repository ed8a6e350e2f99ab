"""`dit-accel eval`: a suite of models, methods, settings, prompts and seeds, each clip beside the dense one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from accelerate import PartialState

from dit_accel.commands.arguments import add_machine, output_folder
from dit_accel.commands.judges import make_metrics
from dit_accel.commands.models import target_device
from dit_accel.commands.suite_plan import Kernels, Plan, Shelf, make_plan
from dit_accel.commands.suite_run import Run, carry_out
from dit_accel.eval.quality import Metric, SetMetric
from dit_accel.eval.rates import matmul_rate
from dit_accel.eval.records import read_run
from dit_accel.eval.report.tables import format_table
from dit_accel.eval.sets import judge_sets, set_row
from dit_accel.eval.suite.folder import check_run, open_run, run_writer
from dit_accel.eval.suite.items import share
from dit_accel.eval.suite.schema import Suite, load_suite
from dit_accel.eval.summary import write_summary

_PATIENCE = timedelta(days=30)  # how long a process that is done waits for the others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", metavar="SUITE", help="a YAML file, or the name of a shipped suite")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the run (default runs/NAME)")
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what is left to run")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    add_machine(parser)


def run(options: argparse.Namespace) -> int:
    suite = load_suite(options.suite)
    made = make_metrics(suite.metrics.items())
    metrics = [metric for metric in made if isinstance(metric, Metric)]
    sets = [metric for metric in made if isinstance(metric, SetMetric)]
    folder: Path = options.output or Path("runs") / suite.name
    state = PartialState(cpu=True, timeout=_PATIENCE)  # processes meet on the CPU, whatever they run on
    device = own_device(options.device, state, timed=suite.runs > 0)
    shelf = Shelf(str(device), options.dtype)
    try:
        with main_first(state):  # the others find the kernels that it has measured
            kernels = Kernels(folder)
            plan = make_plan(suite, options.limit, shelf, options.backend, kernels)
            check_run(folder, suite, plan.made_with)
            if not options.dry_run:
                open_run(output_folder(folder), suite, plan.made_with, state.process_index)
                if state.is_main_process:
                    kernels.save()
        if options.dry_run:
            if state.is_main_process:
                print("\n".join(_in_words(suite, plan, _recorded(folder), shelf)))
            return 0
        place = (state.process_index, state.num_processes)
        writer = run_writer(folder, *place)
        mine = {id(chunk) for chunk in share(plan.chunks, *place)}
        carry_out(
            Run(suite, folder, metrics, shelf, options.backend, writer, *place),
            [task for task in plan.tasks if id(task.chunk) in mine],
        )
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished is in {folder}; run the same command to go on.")
        return 130
    meet(state)
    if state.is_main_process:
        _report(folder, plan, sets, device)
    meet(state)  # torchrun ends all processes when one of them fails
    return 1 if _missing(folder, plan) else 0


def meet(state: PartialState) -> None:
    """Waits for all processes, on the CPU; accelerate's own waiting takes a GPU for each."""
    if state.num_processes > 1:
        torch.distributed.barrier()


@contextmanager
def main_first(state: PartialState) -> Iterator[None]:
    """Lets the main process go through the block before the others; where it fails, torchrun ends them."""
    if not state.is_main_process:
        meet(state)
    yield
    if state.is_main_process:
        meet(state)


def own_device(name: str | None, state: PartialState, *, timed: bool) -> torch.device:
    """The device of this process, one GPU for each while there are enough.

    Raises:
        ValueError: several processes that would time clips on one device, or a GPU where torch sees none.
    """
    target = target_device(name)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))  # of this host
    devices = torch.cuda.device_count() if target.type == "cuda" and target.index is None else 1
    if timed and processes > devices:
        raise ValueError(
            f"the suite times clips, which needs a device for each process, got {processes} processes and {devices} "
            f"{target.type} device{'s' * (devices > 1)} on this host; start {devices} or set runs: 0."
        )
    if target.type != "cuda":
        return target
    if target.index is None:
        target = torch.device("cuda", state.local_process_index % devices)
    torch.cuda.set_device(target)
    return target


def _recorded(folder: Path) -> Set[str]:
    """Ids of what the run has finished so far."""
    return {record["id"] for record in read_run(folder)} if (folder / "suite.yaml").is_file() else set()


def _missing(folder: Path, plan: Plan) -> int:
    finished = _recorded(folder)
    return sum(job.key not in finished for task in plan.tasks for job in task.jobs)


def _in_words(suite: Suite, plan: Plan, done: Set[str], shelf: Shelf) -> Iterator[str]:
    """What the run would do."""
    groups: dict[tuple[str, str, str], list[bool]] = {}
    left = 0.0
    for task in plan.tasks:
        finished = [job.key in done for job in task.jobs]
        groups.setdefault((task.chunk.model, task.chunk.setting.name, task.entry.label), []).extend(finished)
        left += 0.0 if all(finished) else task.flops * max(1, suite.runs)
    times = f"{suite.runs} timed run{'s' * (suite.runs > 1)} of each"
    timed = times if suite.runs else f"{suite.batch} at once, nothing timed"
    clips, recorded = sum(map(len, groups.values())), sum(map(sum, groups.values()))
    yield f"{suite.name}: {clips} clips in {len(plan.chunks)} chunks, {timed}; {recorded} are recorded"
    shown: tuple[str, str] | None = None
    for (model, setting, label), finished in groups.items():
        if shown != (model, setting):
            shown = (model, setting)
            yield f"{model}, {setting}:"
        yield f"  {len(finished):5} clips, {sum(finished)} recorded: {label}"
    latest = shelf.get(plan.tasks[-1].entry.pipeline)
    rate = matmul_rate(latest.device, latest.pipe.transformer.dtype)
    yield (
        f"what is left takes about {left / rate / 60:.1f} minutes of denoising, were all attention dense and all of it "
        f"as fast as matrix products are on this {latest.device.type} ({rate / 1e12:.3g} TFLOP/s)"
    )


def _report(folder: Path, plan: Plan, sets: Sequence[SetMetric], device: torch.device) -> None:
    """The tables, before metrics of sets, whose judges may fail."""
    records = read_run(folder)
    if records:
        print(f"\n{write_summary(folder, records)}")
    if judged := judge_sets(folder, sets, device):
        print(format_table([set_row(row) for row in judged]))
    if missing := _missing(folder, plan):
        print(f"{missing} clips are missing: failures*.jsonl says why; run the same command to try them again.")
    print(f"run: {folder}")
