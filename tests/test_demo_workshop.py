"""Generating for the demo: in turn, watched, stopped at the next step, without a trace."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_accel.demo import workshop as module
from dit_accel.demo.line import Line
from dit_accel.demo.sessions import REMEMBERED, Sessions
from dit_accel.demo.workshop import Comparison, Limits, Progress, Stopped, Wanted, Workshop
from dit_accel.methods import make_method

PROMPT = "a red circle moving left over navy stripes"
METHODS = (make_method("dense"), make_method("radial", tile=16))


def wanted(**changes: Any) -> Wanted:
    size = {"height": 32, "width": 48, "num_frames": 9, "steps": 3}
    return Wanted(**{"model": "shapes", "prompt": PROMPT, "seed": 0, "methods": METHODS, **size, **changes})


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    return Workshop(["shapes"], "cpu")


def run(workshop: Workshop, **changes: Any) -> tuple[list[Progress], Comparison]:
    *progress, comparison = workshop.compare(wanted(**changes), threading.Event())
    assert isinstance(comparison, Comparison)
    return [news for news in progress if isinstance(news, Progress)], comparison


def test_a_comparison_is_watched_step_by_step(workshop: Workshop) -> None:
    progress, comparison = run(workshop, seed=1)
    assert [(news.side, news.step) for news in progress if news.step] == [(s, n) for s in (0, 1) for n in (1, 2, 3)]
    left, right = comparison.sides
    assert left.frames.shape == right.frames.shape == (9, 32, 48, 3)
    assert left.density == 1 > right.density
    assert comparison.quality["psnr"].value is not None
    assert right.command.startswith("dit-accel generate --model shapes --method 'radial(tile=16)'")
    assert "dit_accel.apply(pipe, 'radial', tile=16)" in right.script
    assert "prompt_accuracy" in right.scores


def test_a_dense_result_is_reused(workshop: Workshop) -> None:
    _, first = run(workshop, seed=2)
    progress, second = run(workshop, seed=2)
    assert not first.sides[0].reused and second.sides[0].reused and not second.sides[1].reused
    assert np.array_equal(first.sides[0].frames, second.sides[0].frames)
    assert {news.side for news in progress if news.step} == {1}
    assert not run(workshop, seed=2, steps=2)[1].sides[0].reused


def test_stopping_takes_one_step_and_leaves_the_pipeline_as_it_was(workshop: Workshop) -> None:
    stop, steps = threading.Event(), []

    def watch() -> None:
        for news in workshop.compare(wanted(seed=3, steps=8), stop):
            assert isinstance(news, Progress)
            steps.append(news.step)
            if news.step == 2:
                stop.set()

    with pytest.raises(Stopped):
        watch()
    assert max(steps) <= 3
    assert len(workshop.line) == 0
    model = workshop._loaded["shapes"]
    assert not model.pipe.transformer._forward_pre_hooks
    assert all(type(block.attn1.processor).__name__ == "WanAttnProcessor" for block in model.pipe.transformer.blocks)
    run(workshop, seed=3)


def test_a_visitor_who_leaves_stops_the_run(workshop: Workshop) -> None:
    news = workshop.compare(wanted(seed=4, steps=50), threading.Event())
    while next(news).step < 1:  # type: ignore[union-attr]
        pass
    news.close()  # type: ignore[attr-defined]
    assert len(workshop.line) == 0
    assert threading.active_count() <= 2


def test_runs_wait_in_the_order_of_arrival(workshop: Workshop) -> None:
    first = workshop.compare(wanted(seed=5), threading.Event())
    next(first)
    second = workshop.compare(wanted(seed=6), threading.Event())
    waiting = next(second)
    assert isinstance(waiting, Progress) and "1 run before this one" in waiting.note
    assert isinstance([*first][-1], Comparison)
    notes = [news.note for news in second if isinstance(news, Progress)]
    assert notes[0] == "loading shapes"


def test_a_waiting_run_can_be_stopped(workshop: Workshop) -> None:
    first, stop = workshop.compare(wanted(seed=7), threading.Event()), threading.Event()
    next(first)
    second = workshop.compare(wanted(seed=8), stop)
    next(second)
    stop.set()
    with pytest.raises(Stopped):
        next(second)
    assert len(workshop.line) == 1
    first.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 4096}, "height must be between 1 and 2048 pixels, got 4096"),
        ({"num_frames": 1000}, "frames must be between 1 and 129"),
        ({"steps": 0}, "steps must be between 1 and 100"),
        ({"prompt": "  "}, "prompt must be between 1 and 600 characters, got 0"),
        ({"prompt": "a" * 601}, "prompt must be .* got 601"),
        ({"model": "/etc"}, "model must be one of shapes, got '/etc'"),
        ({"height": 33}, "multiples of"),
        ({"height": 1024, "width": 1024, "num_frames": 49}, "tokens, and 24,000 are the most here"),
        ({"methods": (METHODS[0], make_method("neighborhood", window=(9, 9, 99)))}, "does not fit"),
    ],
    ids=["side", "frames", "steps", "empty", "long", "model", "multiple", "tokens", "method"],
)
def test_what_cannot_be_run_is_refused_before_a_step(workshop: Workshop, changes: dict[str, Any], message: str) -> None:
    seen: list[Progress | Comparison] = []
    with pytest.raises(ValueError, match=message):
        seen.extend(workshop.compare(wanted(**changes), threading.Event()))
    assert all(isinstance(news, Progress) and news.step == 0 for news in seen)
    assert len(workshop.line) == 0


def test_dense_results_beyond_the_budget_are_forgotten(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 9 * 32 * 48 * 3)
    run(workshop, seed=10)
    run(workshop, seed=11)
    assert not run(workshop, seed=10)[1].sides[0].reused


def test_a_full_line_is_refused() -> None:
    line = Line(most=1)
    with line.join() as place:
        assert place.before == 0
        with pytest.raises(ValueError, match="1 runs are waiting"), line.join():
            pass
    assert len(line) == 0


def test_sessions_have_folders_that_go_with_them(workshop: Workshop, tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)
    one, other = sessions.of("one"), sessions.of("other")
    assert sessions.of("one") is one
    assert one.token != other.token
    (one.folder / "clip.mp4").touch()
    copies = [sessions.cache / f"hash-{session.token}" / f"{session.token}-left.webp" for session in (one, other)]
    for copy in copies:
        copy.parent.mkdir(parents=True)
        copy.touch()
    sessions.end("one")
    assert [copy.exists() for copy in copies] == [False, True]
    assert not one.folder.exists() and other.folder.exists()
    assert one.stop.is_set() and not other.stop.is_set()
    sessions.end("one")
    sessions.end("never seen")


def test_what_a_run_writes_after_its_visitor_left_goes_too(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)
    session = sessions.of("one")
    session.begin()
    sessions.end("one")
    late = sessions.cache / "hash" / f"{session.token}-left.webp"
    late.parent.mkdir()
    late.touch()
    sessions.done(session)
    assert not late.exists()
    assert sessions.of("one") is not session


def test_the_first_session_goes_for_one_too_many(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path, most=2)
    first, second, third = (sessions.of(name) for name in ("first", "second", "third"))
    assert [session.folder.exists() for session in (first, second, third)] == [False, True, True]
    sessions.end_all()
    assert not second.folder.exists() and not third.folder.exists()


def test_a_session_runs_one_comparison_and_remembers_a_few(workshop: Workshop, tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)
    session = sessions.of(None)
    session.begin()
    with pytest.raises(ValueError, match="a run of yours is going on"):
        session.begin()
    sessions.done(session)
    _, comparison = run(workshop, seed=12)
    for _ in range(REMEMBERED + 2):
        session.remember(comparison)
    assert len(session.history) == REMEMBERED


def test_limits_can_be_narrowed() -> None:
    with pytest.raises(ValueError, match="steps must be between 1 and 4"):
        Limits(steps=4).check(wanted(steps=5))
