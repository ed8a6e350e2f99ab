"""What `dit-accel reproduce` runs: the commands behind every table, and the records that no command makes again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dit_accel.commands import bench, bench_actions, bench_methods, bench_steps, bench_training

Device = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class Stage:
    """Commands that make records.

    Args:
        name: unique.
        commands: `dit-accel` lines, each run in an empty folder of its own; ``{results}`` is the records' folder.
        records: file of the records -> what each command leaves, a pattern in its folder; parts are joined in order.
        device: what the commands are timed or run on.
        minutes: of all of them, roughly: on one H200, or on two cores.
        resumes: whether a command that was stopped goes on where it was, when it is run again.
        after: stages whose records the commands read.
        compact: whether the records leave out what a score says of each frame, for runs of hundreds of clips.
        cases: names of the cases that the records have to tell of. Default None: records that are there are whole.
        closing: file that a command writes when it is through, though some of its items failed. Default None: what
            ends with an error is not through, unless its records tell of all ``cases``.
    """

    name: str
    commands: tuple[str, ...]
    records: Mapping[str, str]
    device: Device
    minutes: float
    resumes: bool = False
    after: tuple[str, ...] = ()
    compact: bool = False
    cases: Callable[[], Iterable[str]] | None = None
    closing: str | None = None

    def is_done(self, results: Path) -> bool:
        """Whether all records are there, of every case."""
        files = [results / name for name in self.records]
        return all(file.exists() for file in files) and (self.cases is None or self.tells_all(files))

    def tells_all(self, files: Iterable[Path]) -> bool:
        """Whether files together have a record of every case; never of a stage without cases."""
        if self.cases is None:
            return False
        told = {json.loads(line).get("case") for file in files for line in file.read_text().splitlines()}
        return told.issuperset(self.cases())


_GPU = torch.device("cuda")
_SHOWN = ("D=128, density", "D=64, density", "NATTEN")  # of the operator's cases
_KERNELS = (
    "dit-accel bench kernels --quick --operators 'gluon,gluon fp8,fa4,fa4 dense,cudnn' --output bench.jsonl --cases"
)
_CPU_KERNELS = "dit-accel bench kernels --operators torch,flex,sdpa --output bench.jsonl --cases"
_METHODS = "dit-accel bench methods --output methods.jsonl --cases"
_HELD_OUT = (  # pairs of one object and the same with a second one; none of them was seen by the search for the plan
    (1, "a white triangle shrinking and an orange cross resting over brown bars"),
    (2, "a yellow ring shrinking over maroon stripes"),
    (3, "a yellow ring shrinking and a pink square growing over maroon stripes"),
    (4, "a pink cross growing over slate waves"),
    (5, "a pink cross growing and an orange star moving down over slate waves"),
    (6, "a yellow circle shrinking over gray dots"),
)


def _is_shown(case: str) -> bool:
    return any(text in case for text in _SHOWN)


def _compare(*methods: str, run: str = "") -> str:
    return f"dit-accel compare{run}" + "".join(f' --method "{method}"' for method in methods)


STAGES: tuple[Stage, ...] = (
    Stage(
        name="kernels",
        commands=tuple(f"{_KERNELS} '{cases}'" for cases in _SHOWN),
        records={"bench-h200.jsonl": "bench.jsonl"},
        device="gpu",
        minutes=8,
        cases=lambda: (case.name for case in bench.all_cases(_GPU) if case.quick and _is_shown(case.name)),
    ),
    Stage(
        name="methods",
        commands=tuple(f"{_METHODS} {cases}" for cases in ("LLSA", "DiT-S", "growth", "Wan", "Hunyuan", "Flux")),
        records={"methods-h200.jsonl": "methods.jsonl"},
        device="gpu",
        minutes=8,
        cases=lambda: (setting.name for setting in bench_methods.settings(_GPU)),
    ),
    Stage(
        name="actions",
        commands=("dit-accel bench actions --output actions.jsonl",),
        records={"actions-h200.jsonl": "actions.jsonl"},
        device="gpu",
        minutes=2,
        cases=lambda: bench_actions.modules(_GPU, torch.bfloat16),
    ),
    Stage(
        name="steps",
        commands=("dit-accel bench steps --output steps.jsonl",),
        records={"steps-h200.jsonl": "steps.jsonl"},
        device="gpu",
        minutes=22,
        resumes=True,
        cases=lambda: (setting.name for setting in bench_steps.settings(_GPU, quick=False)),
    ),
    Stage(
        name="training",
        commands=("dit-accel bench training --output training.jsonl",),
        records={"training-throughput-h200.jsonl": "training.jsonl"},
        device="gpu",
        minutes=8,
        resumes=True,
        cases=lambda: bench_training.cases(_GPU),
    ),
    Stage(
        name="suite-methods",
        commands=("dit-accel eval methods",),
        records={"suite-methods-h200.jsonl": "runs/methods/records*.jsonl"},
        device="gpu",
        minutes=15,
        resumes=True,
        compact=True,
        closing="runs/methods/summary.md",
    ),
    Stage(
        name="suite-quality",
        commands=("dit-accel eval quality",),
        records={"suite-quality-h200.jsonl": "runs/quality/records*.jsonl"},
        device="gpu",
        minutes=12,
        resumes=True,
        compact=True,
        closing="runs/quality/summary.md",
    ),
    Stage(
        name="kernels-cpu",
        commands=(f"{_CPU_KERNELS} 4,096", f"{_CPU_KERNELS} 8,192"),
        records={"bench-cpu.jsonl": "bench.jsonl"},
        device="cpu",
        minutes=3,
    ),
    Stage(
        name="compare",
        commands=("dit-accel compare",),
        records={"compare-shapes-cpu.jsonl": "outputs/compare/records.jsonl"},
        device="cpu",
        minutes=7,
        resumes=True,
    ),
    Stage(
        name="compare-all-sparse",
        commands=(
            _compare(
                "radial(density=0.35)",
                "neighborhood(window=(7, 12, 16), stride=(7, 4, 8))",
                "grat(pattern='B', group=(2, 8, 8))",
            ),
        ),
        records={"compare-shapes-cpu-all-sparse.jsonl": "outputs/compare/records.jsonl"},
        device="cpu",
        minutes=4,
        resumes=True,
    ),
    Stage(
        name="compare-delta",
        commands=(
            _compare(
                *(
                    f"{method}(density=0.2, start_percent=0.25{delta}{rest})"
                    for method, rest in (("radial", ", tile=64"), ("draft", ""))
                    for delta in ("", ", delta='add'", ", delta='merge'")
                )
            ),
        ),
        records={"compare-shapes-cpu-delta.jsonl": "outputs/compare/records.jsonl"},
        device="cpu",
        minutes=7,
        resumes=True,
    ),
    Stage(
        name="attention-level",
        commands=(
            _compare(
                "radial(density=0.35, start_percent=0.25, tile=32)",
                "radial(density=0.35, start_percent=0.25, tile=32, delta='add')",
                "neighborhood(density=0.35, start_percent=0.25, tile=(1, 4, 8))",
                "grat(density=0.35, start_percent=0.25, pattern='B', group=(2, 4, 8), tile=(1, 4, 8))",
                "sliding_tile(density=0.35, start_percent=0.25, tile=(1, 4, 8))",
                "attention_tile(reference_frames=1, start_percent=0.25)",
                "draft(density=0.35, start_percent=0.25, region=(1, 4, 8))",
                "pyramid(density=0.35, start_percent=0.25)",
                "log_linear(density=0.35, start_percent=0.25)",
                run=" --height 128 --width 160 --num-frames 17 --steps 8 --attention",
            ),
        ),
        records={"attention-level-cpu.jsonl": "outputs/compare/records.jsonl"},
        device="cpu",
        minutes=5,
        resumes=True,
    ),
    Stage(
        name="compare-image",
        commands=("dit-accel compare --model shapes-image --method draft --method dit_fast_attn",),
        records={"compare-shapes-image-cpu.jsonl": "outputs/compare/records.jsonl"},
        device="cpu",
        minutes=2,
        resumes=True,
    ),
    Stage(
        name="tune",
        commands=(
            "dit-accel tune --budget psnr=28 --prompts 1 --minutes 14 --groups 4"
            " --methods neighborhood draft log_linear full/reuse full/band+residual full+share",
        ),
        records={"plan-shapes-cpu.json": "plan.json", "tune-shapes-cpu.jsonl": "plan.curve.jsonl"},
        device="cpu",
        minutes=15,
    ),
    Stage(
        name="compare-plan",
        commands=tuple(
            f"dit-accel compare --seed {seed} --prompt '{prompt}'"
            " --method {results}/plan-shapes-cpu.json --method neighborhood --method draft"
            for seed, prompt in _HELD_OUT
        ),
        records={"compare-shapes-cpu-plan.jsonl": "outputs/compare/records.jsonl"},
        device="cpu",
        minutes=24,
        resumes=True,
        after=("tune",),
    ),
)

# Records that stay in the repository as they are: file -> why no stage makes them.
ARCHIVED: dict[str, str] = {
    "compare-shapes-cpu-prompts.jsonl": "three prompts with presets that have changed since; no table stands on it",
    "demo-cpu.jsonl": "the times of a page in a browser: python tests/demo_times.py measures them again",
    "hostile-check-h200.jsonl": "a check, not a measurement: python -m dit_accel.eval.hostile_check runs it again",
    "kernel-check-h200.jsonl": "a check, not a measurement: python -m dit_accel.eval.kernel_check runs it again",
    "kernel-study-h200.jsonl": "variants of kernels that were tried and are not in the package",
    "list-check-h200.jsonl": "a check, not a measurement: python -m dit_accel.eval.list_check runs it again",
    "pyramid-study-h200.jsonl": "variants of kernels that were tried and are not in the package",
    "quality-shapes-h200.jsonl": "runs of several versions, some of trained weights; suite-quality is its successor",
    "shapes-evaluation-h200.jsonl": "of the training of the embedded weights, which are shipped",
    "shapes-image-evaluation-h200.jsonl": "of the training of the embedded weights, which are shipped",
    "shapes-image-training-h200.jsonl": "of the training of the embedded weights, which are shipped",
    "shapes-sampling-cpu.jsonl": "the search for the embedded pipeline's default schedule",
    "shapes-training-h200.jsonl": "of the training of the embedded weights, which are shipped",
    "tune-h200.jsonl": "read off what dit-accel tune printed, whose command is in each line",
}
