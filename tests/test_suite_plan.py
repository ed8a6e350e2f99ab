"""Planning a suite: what is refused before a clip is made, one pipeline at a time, and the device of each process."""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from dit_accel.commands import suite_plan
from dit_accel.commands.eval import main_first, own_device
from dit_accel.commands.models import Model, load, target_device
from dit_accel.commands.suite_plan import Kernels, Plan, Shelf, make_plan
from dit_accel.eval.suite.schema import load_suite
from dit_accel.pipelines import shapes

WEIGHTS = str(Path(shapes.__file__).with_name("weights"))
SUITE: dict[str, Any] = {
    "name": "tiny",
    "models": ["shapes"],
    "methods": ["radial(tile=16)"],
    "settings": [{"name": "small", "height": 32, "width": 48, "num_frames": 5, "steps": 2}],
    "prompts": ["a red star moving up"],
    "floors": [],
    "runs": 0,
}


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite_plan, "load", functools.cache(load))
        yield


def plan(folder: Path, backend: str = "auto", **changes: Any) -> tuple[Plan, Kernels]:
    file = folder / "suite.yaml"
    file.write_text(yaml.safe_dump(SUITE | changes))
    kernels = Kernels(folder)
    return make_plan(load_suite(file), None, Shelf("cpu", None), backend, kernels), kernels


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"methods": ["dense(kernel=None)"]},
            r"dense and dense\(kernel=None\) are the same run at setting small of sh",
        ),
        (
            {"methods": ["radial(tile=16)", "radial(tile=16, delta=None)"]},
            r"radial\(tile=16\) and radial\(tile=16, delta=None\) are the same run",
        ),
        (
            {"models": [WEIGHTS], "methods": ["radial(tile=16)", f"radial(tile=16)@{WEIGHTS}"]},
            r"radial\(tile=16\) and radial\(tile=16\)@.*weights are the same run at setting small of .*weights; drop",
        ),
    ],
    ids=["dense without a kernel", "a default written out", "in the model's own pipeline"],
)
def test_two_entries_that_are_one_run_are_refused_by_name(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        plan(tmp_path, **changes)


def test_a_method_that_is_the_floor_is_run_once(tmp_path: Path) -> None:
    floor = [task.entry.label for task in plan(tmp_path, floors=["backend"])[0].tasks if task.entry.role == "floor"]
    found, _ = plan(tmp_path, floors=["backend"], methods=[*floor, "radial(tile=16)"])
    assert [task.entry.label for task in found.tasks] == ["dense", *floor, "radial(tile=16)"] and len(floor) == 1


@pytest.mark.parametrize("method", ["radial(tile=16)", "draft", "radial(tile=16, delta='add')"])
def test_a_backend_that_cannot_run_here_is_refused(method: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at setting small of shapes: backend='gluon' needs"):
        plan(tmp_path, "gluon", methods=[method])


def test_one_pipeline_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, weakref.ref[Any]]] = []

    def alone(name: str, device: str | None, dtype: str | None) -> Model:
        assert [other for other, transformer in loaded if transformer() is not None] == []
        model = load(name, device, dtype)
        loaded.append((name, weakref.ref(model.pipe.transformer)))
        cycle: dict[str, Any] = {"pipe": model.pipe}  # as a pipeline has them once it ran
        model.pipe.cycle = cycle
        return model

    monkeypatch.setattr(suite_plan, "load", alone)
    other = str(tmp_path / "other")
    Path(other).symlink_to(WEIGHTS)
    plan(tmp_path, models=["shapes", other], methods=["radial(tile=16)", f"radial(tile=32)@{WEIGHTS}"])
    assert [name for name, _ in loaded] == ["shapes", WEIGHTS, other, WEIGHTS]


def test_kernels_are_measured_once_for_a_device_and_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, kernels = plan(tmp_path, floors=["backend"])
    kernels.save()
    known = json.loads((tmp_path / "kernels.json").read_text())
    assert {name: [*settings] for name, settings in known.items()} == {"shapes, cpu, torch.float32": ["small"]}
    assert {path.name for path in tmp_path.iterdir()} == {"suite.yaml", "kernels.json"}
    monkeypatch.setattr(suite_plan, "compare_kernels", lambda *_: pytest.fail("measured again"))
    again, _ = plan(tmp_path, floors=["backend"])
    assert [task.jobs for task in again.tasks] == [task.jobs for task in first.tasks]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two GPUs, and the devices that were made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def process(index: int, processes: int) -> Any:
    return SimpleNamespace(num_processes=processes, local_process_index=index, is_main_process=index == 0)


@pytest.mark.parametrize(
    ("index", "processes", "expected"), [(0, 1, ["block"]), (0, 2, ["block", "barrier"]), (1, 2, ["barrier", "block"])]
)
def test_the_main_process_goes_first_and_none_takes_a_gpu_to_wait(
    index: int, processes: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: events.append("barrier"))  # without device_ids
    with main_first(process(index, processes)):
        events.append("block")
    assert events == expected


@pytest.mark.parametrize("name", [None, "cuda"], ids=str)
def test_each_process_has_a_gpu_of_its_own(name: str | None, gpus: list[torch.device]) -> None:
    assert [own_device(name, process(index, 2), timed=True) for index in range(2)] == gpus
    assert gpus == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_processes_that_time_nothing_take_turns_on_the_gpus(gpus: list[torch.device]) -> None:
    found = [own_device(None, process(index, 3), timed=False) for index in range(3)]
    assert [device.index for device in found] == [0, 1, 0] and gpus == found
    with pytest.raises(ValueError, match="got 3 processes and 2 cuda devices on this host; start 2 or set runs: 0"):
        own_device(None, process(0, 3), timed=True)


def test_the_gpu_that_was_named_is_taken(gpus: list[torch.device]) -> None:
    assert own_device("cuda:1", process(0, 1), timed=True) == torch.device("cuda:1") == gpus[0]
    with pytest.raises(ValueError, match="got 2 processes and 1 cuda device on this host"):
        own_device("cuda:1", process(0, 2), timed=True)
    with pytest.raises(ValueError, match="--device cuda:2 is not among the GPUs that torch sees, .* the last is 1"):
        own_device("cuda:2", process(0, 1), timed=True)


def test_processes_of_this_host_alone_are_counted(gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert own_device(None, process(1, 4), timed=True) == torch.device("cuda:1")


def test_a_device_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--device must be cpu, cuda or cuda:NUMBER, got 'cudaa'"):
        target_device("cudaa")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="--device cuda needs an NVIDIA GPU, and torch sees none"):
        own_device("cuda", process(0, 1), timed=True)
