"""Judges in an interpreter of their own: stub packages that record how they are called, crash and hang."""

from __future__ import annotations

import ast
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from torch import Tensor

from dit_accel.eval.frames import as_uint8
from dit_accel.eval.quality.drivers import IMAGE_REWARD, VBENCH
from dit_accel.eval.quality.outside import DIMENSIONS, image_reward, vbench

TORCH = """
import contextlib, types
cuda = types.SimpleNamespace(is_available=lambda: False)
no_grad = contextlib.nullcontext
device = str
"""
RECORD = """
import json, os
def record(**call):
    with open(os.environ["RECORDS"] + "/calls.jsonl", "a") as file:
        file.write(json.dumps(call) + "\\n")
"""
STUB_IMAGE_REWARD = """
import os
from PIL import Image
from record import record

class Model:
    def score(self, prompt, path):
        assert type(path) is str
        pixels = list(Image.open(path).convert("RGB").tobytes())
        record(prompt=prompt)
        return sum(pixels) / len(pixels) + len(prompt)

def load(name, device, download_root):
    hub = [os.environ.get(key) for key in ("HF_HUB_OFFLINE", "https_proxy")]
    record(name=name, device=device, download_root=download_root, hub=hub)
    print("loaded")
    return Model()
"""
STUB_VBENCH = """
import json, os, shutil
from record import record

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.output = output_path
        os.makedirs(output_path, exist_ok=True)
        record(device=device, cache=os.environ.get("VBENCH_CACHE_DIR"))

    def evaluate(self, videos_path, name, prompt_list=(), dimension_list=None, local=False, mode="vbench_standard"):
        record(dimension_list=dimension_list, local=local, mode=mode, prompts=prompt_list)
        videos = sorted(os.listdir(videos_path), reverse=True)
        for video in videos:
            shutil.copy(os.path.join(videos_path, video), os.environ["RECORDS"])
        scores = [{"video_path": f"{videos_path}/{video}", "video_results": 50 + int(video[:5])} for video in videos]
        with open(os.path.join(self.output, name + "_eval_results.json"), "w") as file:
            json.dump({dimension_list[0]: [0.625, scores]}, file)
"""
Interpreter = Callable[..., str]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def interpreter(tmp_path: Path) -> Interpreter:
    """Makes an interpreter that has the given modules: a script, as a virtual environment takes seconds."""

    def make(**modules: str) -> str:
        for name, text in ({"torch": TORCH, "record": RECORD} | modules).items():
            (tmp_path / f"{name}.py").write_text(text)
        script = tmp_path / "python"
        script.write_text(
            f'#!/bin/sh\nprintf %s "$PYTHONPATH" > "{tmp_path}/inherited"\n'
            f'RECORDS="{tmp_path}" PYTHONPATH="{tmp_path}" PYTHONNOUSERSITE=1 exec "{sys.executable}" "$@"\n'
        )
        script.chmod(0o755)
        return str(script)

    return make


def calls(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def flat(levels: list[int], height: int = 5, width: int = 7) -> Tensor:
    """A clip whose frames each have one level of 255."""
    return (torch.tensor(levels, dtype=torch.float32) / 255).view(-1, 1, 1, 1).expand(-1, height, width, 3)


def test_image_reward_judges_all_clips_in_one_process(
    interpreter: Interpreter, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    python = interpreter(ImageReward=STUB_IMAGE_REWARD)
    metric = image_reward(python, tmp_path)
    judge = metric.start()
    judge.add(flat([10, 20]), None, "four")
    judge.add(flat([100]), flat([7]), "sixsix")
    score = judge.result()
    assert (metric.name, metric.higher_is_better, metric.scope) == ("image_reward", True, "set")
    assert score.values == (15 + 4, 100 + 6)
    assert (score.value, score.samples) == (62.5, 2)
    loads = [call for call in calls(tmp_path) if "name" in call]
    assert [call["name"] for call in loads] == [str(tmp_path / "ImageReward.pt")]
    assert loads[0]["download_root"] == str(tmp_path)
    assert loads[0]["hub"] == ["1", "http://127.0.0.1:9"]
    assert (tmp_path / "inherited").read_text() == ""
    assert os.listdir(temporary) == []


def test_image_reward_sees_eight_evenly_spaced_frames(interpreter: Interpreter, tmp_path: Path) -> None:
    judge = image_reward(interpreter(ImageReward=STUB_IMAGE_REWARD), tmp_path).start()
    judge.add(flat([*range(15)]), None, "")
    assert judge.result().value == np.mean(range(0, 15, 2))
    assert len(calls(tmp_path)) == 1 + 8


@pytest.mark.parametrize("size", [(6, 8), (5, 7)], ids=str)
def test_vbench_gets_lossless_clips_of_its_own_prompts(
    interpreter: Interpreter, tmp_path: Path, temporary: Path, size: tuple[int, int]
) -> None:
    clips = [torch.rand(3, *size, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    judge = vbench("imaging_quality", interpreter(vbench=STUB_VBENCH), tmp_path).start()
    judge.add(clips[0], None, "a red square")
    judge.add(clips[1], None)
    score = judge.result()
    assert score.value == 0.625
    assert score.values == (0.50, 0.51)
    made, evaluated = calls(tmp_path)
    assert made == {"device": "cpu", "cache": str(tmp_path)}
    assert evaluated == {
        "dimension_list": ["imaging_quality"],
        "local": True,
        "mode": "custom_input",
        "prompts": {"00000.mp4": "a red square", "00001.mp4": ""},
    }
    for number, clip in enumerate(clips):
        reader = imageio_ffmpeg.read_frames(str(tmp_path / f"{number:05d}.mp4"), pix_fmt="rgb24")
        assert next(reader)["source_size"] == size[::-1]
        decoded = [np.frombuffer(frame, np.uint8).reshape(*size, 3) for frame in reader]
        np.testing.assert_array_equal(decoded, as_uint8(clip))
    assert os.listdir(temporary) == []


def test_clip_scores_of_vbench_are_in_the_order_of_clips(interpreter: Interpreter, tmp_path: Path) -> None:
    judge = vbench("motion_smoothness", interpreter(vbench=STUB_VBENCH), tmp_path).start()
    for level in range(3):
        judge.add(flat([level, level]), None)
    assert judge.result().values == (50, 51, 52)


@pytest.mark.parametrize(
    ("stub", "reason"),
    [
        ("raise RuntimeError('weights are\\nold')", "old"),
        ("import os; os._exit(3)", "ended with exit code 3."),
        ("import missing_package", "ModuleNotFoundError: No module named 'missing_package'"),
        ("", "ImportError: cannot import name 'VBench' from 'vbench'"),
    ],
    ids=["crash", "silent", "dependency", "another package"],
)
def test_failure_is_the_reason_of_a_skip(
    interpreter: Interpreter, tmp_path: Path, temporary: Path, stub: str, reason: str
) -> None:
    judge = vbench("motion_smoothness", interpreter(vbench=stub), tmp_path).start()
    judge.add(flat([1, 2]), None)
    score = judge.result()
    assert (score.value, score.samples) == (None, 1)
    assert str(score.skipped).startswith("vbench_motion_smoothness gave no score: ")
    assert reason in str(score.skipped)
    assert "\n" not in str(score.skipped)
    assert os.listdir(temporary) == []


def test_missing_package_is_named(interpreter: Interpreter, tmp_path: Path) -> None:
    judge = vbench("motion_smoothness", interpreter(), tmp_path).start()
    judge.add(flat([1, 2]), None)
    assert str(judge.result().skipped).endswith("ModuleNotFoundError: No module named 'vbench'")


def test_hanging_process_ends_with_all_it_started(interpreter: Interpreter, tmp_path: Path, temporary: Path) -> None:
    stub = "import subprocess, time, record\nrecord.record(pid=subprocess.Popen(['sleep', '60']).pid)\ntime.sleep(60)\n"
    judge = vbench("motion_smoothness", interpreter(vbench=stub), tmp_path, timeout=2).start()
    judge.add(flat([1, 2]), None)
    assert str(judge.result().skipped).endswith("took longer than 2 s.")
    [child] = calls(tmp_path)
    assert wait_until(lambda: not running(child["pid"]))
    assert os.listdir(temporary) == []


def running(pid: int) -> bool:
    """Whether the process is there and more than a name that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> bool:
    for _ in range(50):
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_folder_is_removed_when_nobody_asks_for_the_score(
    interpreter: Interpreter, tmp_path: Path, temporary: Path
) -> None:
    judge = image_reward(interpreter(), tmp_path).start()
    judge.add(flat([1]), None, "text")
    assert len(os.listdir(temporary)) == 1
    with pytest.warns(ResourceWarning):
        del judge
    assert os.listdir(temporary) == []


def test_nothing_runs_without_clips_or_without_their_prompts(interpreter: Interpreter, tmp_path: Path) -> None:
    python = interpreter(ImageReward="raise SystemError")
    assert image_reward(python, tmp_path).start().result().skipped == "image_reward needs clips."
    judge = image_reward(python, tmp_path).start()
    judge.add(flat([1]), None, "text")
    judge.add(flat([1]), None)
    assert judge.result().skipped == "image_reward needs the prompt of every clip."


def test_a_tool_that_ends_without_an_answer_is_skipped(interpreter: Interpreter, tmp_path: Path) -> None:
    judge = image_reward(interpreter(ImageReward="import os\nos._exit(0)"), tmp_path).start()
    judge.add(flat([1]), None, "text")
    assert judge.result().skipped == "image_reward gave no score: its driver wrote no answer."


def test_what_cannot_run_is_refused_at_once(interpreter: Interpreter, tmp_path: Path) -> None:
    python = interpreter()
    with pytest.raises(ValueError, match="image_reward needs the interpreter .*/none, which cannot be run"):
        image_reward(str(tmp_path / "none"), tmp_path)
    with pytest.raises(ValueError, match="weights in the folder .*/none, which does not exist"):
        image_reward(python, tmp_path / "none")
    with pytest.raises(ValueError, match="dimension must be one of subject_consistency, .* got 'colour'"):
        vbench("colour", python, tmp_path)
    for timeout in (0, "an hour"):
        with pytest.raises(ValueError, match="timeout in seconds, above 0, got"):
            vbench("motion_smoothness", python, tmp_path, timeout)  # type: ignore[arg-type]


def test_interpreter_of_a_virtual_environment_stays_a_link(tmp_path: Path, interpreter: Interpreter) -> None:
    """Python finds its environment from the path that it was started by."""
    interpreter(ImageReward=STUB_IMAGE_REWARD)
    (tmp_path / "link").symlink_to(tmp_path / "python")
    (tmp_path / "python").write_text(f'#!/bin/sh\nprintf %s "$0" > "{tmp_path}/started"\nexit 1\n')
    judge = image_reward(str(tmp_path / "link"), tmp_path).start()
    judge.add(flat([1]), None, "text")
    judge.result()
    assert (tmp_path / "started").read_text() == str(tmp_path / "link")


@pytest.mark.parametrize("driver", [IMAGE_REWARD, VBENCH], ids=["image_reward", "vbench"])
def test_drivers_run_under_old_pythons_and_know_nothing_of_this_package(driver: str) -> None:
    ast.parse(driver, feature_version=(3, 8))
    assert "dit_accel" not in driver


def test_dynamic_degree_has_no_better_direction() -> None:
    assert [name for name, higher in DIMENSIONS.items() if higher is None] == ["dynamic_degree"]
