"""`dit-accel bench`: the operator against its peers, and methods against dense attention, in turns, with pictures."""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dit_accel.commands import bench_actions, bench_steps, bench_training
from dit_accel.commands.bench_methods import settings
from dit_accel.eval.bench.actions import action_table
from dit_accel.eval.bench.actions import bench_actions as measure_actions
from dit_accel.eval.bench.calls import CallRow, bench_call, call_table, plot_growth
from dit_accel.eval.bench.cases import Case, MakePlan, random_cases
from dit_accel.eval.bench.operators import DEFAULT, OPERATORS, Operator
from dit_accel.eval.bench.report import append, facts, plot, read, table
from dit_accel.eval.bench.run import Effort, Row, bench_case
from dit_accel.eval.bench.steps import StepRow, bench_step, step_table
from dit_accel.eval.bench.training import TrainingRow, training_table
from dit_accel.eval.bench.training import bench_training as measure_training
from dit_accel.eval.rates import matmul_rate
from dit_accel.kernels import BlockPlan
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import StaticMethod
from dit_accel.methods.grat import GRATAttnProcessor
from dit_accel.methods.neighborhood import NeighborhoodAttnProcessor
from dit_accel.methods.radial import RadialAttnProcessor

WAN = TokenLayout((21, 45, 80))
CLIP = TokenLayout((30, 48, 80))
FLUX = TokenLayout((1, 256, 256))
HUNYUAN = TokenLayout((33, 45, 80), 256, "suffix")
SMALL = TokenLayout((5, 14, 22), 21, "prefix")

# Published settings where the name says whose; the others at a density near that of their papers.
GPU_METHODS: tuple[tuple[str, StaticMethod, TokenLayout, int, bool], ...] = (
    ("radial", RadialAttnProcessor(), WAN, 40, True),
    ("neighborhood", NeighborhoodAttnProcessor(density=0.2), WAN, 40, False),
    ("grat", GRATAttnProcessor(density=0.2), WAN, 40, False),
    ("NATTEN clip, stride 16x8x8", NeighborhoodAttnProcessor(window=(18, 24, 24), stride=(16, 8, 8)), CLIP, 24, True),
    ("NATTEN clip, stride 1", NeighborhoodAttnProcessor(window=(18, 24, 24)), CLIP, 24, True),
    ("sliding tiles", NeighborhoodAttnProcessor(window=(18, 24, 24), stride=(6, 8, 8)), CLIP, 24, False),
    ("NATTEN Flux 4K", NeighborhoodAttnProcessor(window=(1, 80, 80), stride=(1, 16, 16)), FLUX, 24, True),
    ("radial, HunyuanVideo", RadialAttnProcessor(sink=False), HUNYUAN, 24, False),
)
CPU_METHODS: tuple[tuple[str, StaticMethod, TokenLayout, int, bool], ...] = (
    ("neighborhood", NeighborhoodAttnProcessor(window=(3, 7, 9)), SMALL, 2, True),
)
EFFORTS = {  # by device and whether it is the short run
    ("cuda", False): Effort(rounds=5, turn_seconds=0.25),
    ("cuda", True): Effort(rounds=3, turn_seconds=0.25),
    ("cpu", False): Effort(rounds=5, turn_seconds=0.0),
    ("cpu", True): Effort(rounds=3, turn_seconds=0.0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    kernels = actions.add_parser("kernels", help="time the operator and its peers; every speed is checked first")
    kernels.add_argument("--operators", help=f"comma-separated, of {', '.join(OPERATORS)}")
    methods = actions.add_parser("methods", help="time whole attention calls of methods, their choice of keys included")
    layers = actions.add_parser(
        "actions", help="time the actions of a plan on one attention module, projections and all"
    )
    steps = actions.add_parser(
        "steps", help="time forwards of real models with random weights; cases that --output has are left out"
    )
    training = actions.add_parser(
        "training", help="time optimisation steps of DiT-S on pixels; cases that --output has are left out"
    )
    for action in (kernels, methods, layers, steps, training):
        action.add_argument("--output", type=Path, help="append JSON lines, one per operator and case, to this file")
        action.add_argument("--cases", default="", help="only those whose name holds this text")
        action.add_argument("--quick", action="store_true", help="fewer rounds, of cases a few, of models two blocks")
    picture = actions.add_parser("plot", help="draw TFLOP/s against density, or seconds against tokens, from records")
    picture.add_argument("records", type=Path, help="what `bench kernels` or `bench methods` wrote with --output")
    picture.add_argument("--output", type=Path, help="the PNG (default: beside the records)")


def run(options: argparse.Namespace) -> int:
    runs: dict[str, Callable[[argparse.Namespace], int]] = {
        "plot": _plot,
        "kernels": _kernels,
        "methods": _methods,
        "actions": _actions,
        "steps": _steps,
        "training": _training,
    }
    return runs[options.action](options)


def _plot(options: argparse.Namespace) -> int:
    path = options.output or options.records.with_suffix(".png")
    rows = read(options.records, Row.__required_keys__ & CallRow.__required_keys__)
    if all("batch" in row for row in rows):
        plot_growth(rows, path)
    else:
        plot(read(options.records), path)
    print(f"picture: {path}")
    return 0


def _methods(options: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dense = [operator for operator in _operators(None, device) if operator.dense]
    wanted = _named(dict.fromkeys(setting.name for setting in settings(device)), options.cases)
    shared = facts(shlex.join(["dit-accel", *sys.argv[1:]]), matmul_rate(device, dtype) / 1e12)
    wrong = False
    for setting in settings(device):
        if setting.name not in wanted:
            continue
        case = setting.case(device)
        rows = bench_call(case, dense, device, dtype, EFFORTS[device.type, options.quick])
        print(f"\n{case.name}\n{call_table(rows)}")
        wrong |= rows[0]["refused"] is not None
        if options.output:
            append(options.output, rows, shared)
    return 1 if wrong else 0


def _actions(options: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shared = facts(shlex.join(["dit-accel", *sys.argv[1:]]), matmul_rate(device, dtype) / 1e12)
    found = bench_actions.modules(device, dtype)
    effort = replace(EFFORTS[device.type, options.quick], turn_seconds=bench_actions.TURN_SECONDS[device.type])
    wrong = False
    for name in _named(found, options.cases):
        rows = measure_actions(found[name](), device, effort)
        print(f"\n{name}\n{action_table(rows)}")
        wrong |= any(row["refused"] is not None for row in rows)
        if options.output:
            append(options.output, rows, shared)
    return 1 if wrong else 0


def _steps(options: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = bench_steps.cases(device, dtype, options.quick)

    def measure(name: str) -> tuple[list[StepRow], str]:
        try:
            case = found[name]()
        except torch.OutOfMemoryError as error:
            return [], f"  no speed, there is no room for the model: {str(error).partition('. ')[0]}"
        rows = bench_step(case, device, bench_steps.EFFORTS[device.type, options.quick])
        return rows, step_table(rows)

    return _case_by_case(options, found, StepRow.__required_keys__, measure)


def _training(options: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = bench_training.cases(device)

    def measure(name: str) -> tuple[list[TrainingRow], str]:
        rows = measure_training(found[name](), device)
        return rows, training_table(rows)

    return _case_by_case(options, found, TrainingRow.__required_keys__, measure)


def _case_by_case(
    options: argparse.Namespace,
    found: Iterable[str],
    keys: frozenset[str],
    measure: Callable[[str], tuple[Sequence[Mapping[str, Any]], str]],
) -> int:
    """Measures the cases that are wanted and not yet in the file, each with its table; 1 if a method failed in one."""
    wanted = _named(found, options.cases)
    written = options.output is not None and options.output.exists()
    told = {row["case"] for row in read(options.output, keys)} if written else set()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shared = facts(shlex.join(["dit-accel", *sys.argv[1:]]), matmul_rate(device, dtype) / 1e12)
    wrong = False
    for name in wanted:
        if name not in told:
            rows, text = measure(name)
            print(f"\n{name}\n{text}", flush=True)
            if options.output:
                append(options.output, rows, shared)
            wrong |= any(row["refused"] is not None and not row["dense"] for row in rows)
            gc.collect()  # a model and what is applied to it hold each other, and the next one needs the room
    return 1 if wrong else 0


def _kernels(options: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    operators = _operators(options.operators, device)
    found = {case.name: case for case in all_cases(device) if case.quick or not options.quick}
    cases = [found[name] for name in _named(found, options.cases)]
    matmul = matmul_rate(device, dtype) / 1e12
    shared = facts(shlex.join(["dit-accel", *sys.argv[1:]]), matmul)
    print(f"{shared['machine'].get('gpu', shared['machine']['cpu'])}, matrix product {matmul:.3g} TFLOP/s")
    wrong = False
    for case in cases:
        rows = bench_case(case, operators, device, dtype, EFFORTS[device.type, options.quick])
        print(f"\n{case.name}\n{table(rows)}")
        wrong |= any(row["error"] is not None and row["refused"] is not None for row in rows)
        if options.output:
            append(options.output, rows, shared)
    if options.output:
        print(f"\nrecords: {options.output}")
    return 1 if wrong else 0


def _named(found: Iterable[str], text: str) -> list[str]:
    """The names that hold a text; a ValueError lists all if none does."""
    names = [*found]
    if not any(text in name for name in names):
        raise ValueError(f"no case matches --cases {text!r}; there are {'; '.join(names)}.")
    return [name for name in names if text in name]


def _operators(names: str | None, device: torch.device) -> list[Operator]:
    wanted = names.split(",") if names else DEFAULT[device.type]
    for name in wanted:
        if name not in OPERATORS:
            raise ValueError(f"there is no operator {name!r}; choose of {', '.join(OPERATORS)}.")
    return [OPERATORS[name] for name in wanted]


def all_cases(device: torch.device) -> list[Case]:
    """Random lists, and the plans of the static methods."""
    table = GPU_METHODS if device.type == "cuda" else CPU_METHODS
    return [*random_cases(device), *(_method_case(*entry, device=device) for entry in table)]


def _method_case(
    label: str, method: StaticMethod, layout: TokenLayout, heads: int, quick: bool, *, device: torch.device
) -> Case:
    head_dim = 128 if device.type == "cuda" else 32
    return Case(
        name=f"{label}, {layout.num_tokens:,} tokens, {heads} heads, D={head_dim}",
        group="",
        layout=layout,
        heads=heads,
        head_dim=head_dim,
        make_plan=_plan_of(method, layout),
        density=layout.joint_density(method.ideal_density(layout)),
        quick=quick,
    )


def _plan_of(method: StaticMethod, layout: TokenLayout) -> MakePlan:
    def make(device: torch.device) -> BlockPlan:
        plan = method.plan(layout)
        assert plan is not None, "every method here is sparse on its layout"
        return plan.to(device)

    return make
