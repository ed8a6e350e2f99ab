"""Assignments of actions, their course in a run against a simulation of each head, and tensors that wait."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dit_accel.methods.actions import FULL, REUSE, Action, Assignment, Course, course_of
from dit_accel.methods.band import BandAttnProcessor
from dit_accel.methods.kept import Keep, bytes_of, put_by

BAND, NARROW = BandAttnProcessor(half_width=3), BandAttnProcessor(half_width=1)
RESIDUAL = Action(BAND, residual=True)
ALPHABET = (FULL, REUSE, Action(BAND), RESIDUAL, Action(NARROW, residual=True))
SHARING = (Action(share=True), Action(BAND, share=True), Action(BAND, residual=True, share=True))


def random_assignment(seed: int, steps: int = 7, blocks: int = 3, groups: int = 4) -> Assignment:
    """Heads that choose among ``ALPHABET``, and layers that share as a whole."""
    make = torch.Generator().manual_seed(seed)
    table = torch.randint(len(ALPHABET), (steps, blocks, groups), generator=make)
    shared = torch.randint(len(SHARING), (steps, blocks, groups), generator=make) + len(ALPHABET)
    table = torch.where(torch.rand(steps, blocks, 1, generator=make) < 0.3, shared, table)
    table = torch.where(torch.rand(steps, blocks, 1, generator=make) < 0.3, 1, table)  # layers that reuse as a whole
    return Assignment(ALPHABET + SHARING, table.short())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": BAND, "reuse": True}, "computes nothing"),
        ({"residual": True, "reuse": True}, "computes nothing"),
        ({"share": True, "reuse": True}, "computes nothing"),
        ({"residual": True}, "needs a sparse method"),
    ],
    ids=["reuse and method", "reuse and residual", "reuse and share", "residual of nothing"],
)
def test_actions_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Action(**options)  # type: ignore[arg-type]


def test_actions_say_what_they_do() -> None:
    assert [str(action) for action in (FULL, REUSE, RESIDUAL, Action(share=True))] == [
        "full",
        "reuse",
        "band(half_width=3)+residual",
        "full+share",
    ]


@pytest.mark.parametrize(
    ("actions", "table", "message"),
    [
        ((), [[[0]]], "first action must be full"),
        ((REUSE, FULL), [[[0]]], "first action must be full"),
        ((FULL,), [[0]], r"integers \[steps, blocks, heads or 1\], got torch.int64 \[1, 1\]"),
        ((FULL,), [[[0.0]]], "got torch.float32"),
        ((FULL,), [[[]]], r"\[1, 1, 0\]"),
        ((FULL, REUSE), [[[0, 2]]], "name 2 actions from 0 on, got 0 to 2"),
        ((FULL, REUSE), [[[0, -1]]], "got -1 to 0"),
        ((FULL, Action(share=True)), [[[0, 1]]], "all heads of a layer share"),
    ],
    ids=["nothing", "reuse first", "two axes", "floats", "empty", "too high", "negative", "some heads share"],
)
def test_assignments_that_cannot_be_followed_are_refused(
    actions: tuple[Action, ...], table: list[object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Assignment(actions, torch.tensor(table))


@pytest.mark.parametrize(
    ("tuned", "run", "rows"),
    [
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (6, 3, [1, 3, 5]),
        (3, 6, [0, 0, 1, 1, 2, 2]),
        (4, 7, [0, 0, 1, 2, 2, 3, 3]),
        (50, 1, [25]),
    ],
    ids=["same", "half", "double", "odd", "one"],
)
def test_a_run_of_another_length_takes_rows_by_their_share(tuned: int, run: int, rows: list[int]) -> None:
    actions = (FULL, *(Action(BandAttnProcessor(half_width=width)) for width in range(tuned - 1)))
    assignment = Assignment(actions, torch.arange(tuned)[:, None, None])
    assert assignment.rows(run).flatten().tolist() == rows


@pytest.mark.parametrize("steps", [1, 2, 9, 50, 97])
def test_a_run_as_long_as_the_plan_takes_it_as_it_is(steps: int) -> None:
    assignment = random_assignment(0, steps)
    assert torch.equal(assignment.rows(steps), assignment.table)


# What a run does, written again as a simulation of each head.


class Made(NamedTuple):
    """Something kept: what it is, and when and in which branch it was computed; two branches may hold the same."""

    what: tuple[object, ...]
    step: int
    branch: str


class Simulated(NamedTuple):
    taken: list[list[list[Action]]]
    needed: list[list[set[tuple[object, ...]]]]  # after each step and block
    used: list[list[set[tuple[object, ...]]]]


def simulate(assignment: Assignment, num_steps: int, max_age: int | None, forced: set[tuple[int, int]]) -> Simulated:
    """What each head really does and which kept things it takes, told step by step, and from the end backwards."""
    rows, blocks, groups = assignment.rows(num_steps), range(assignment.blocks), range(assignment.groups)
    limit = max_age or num_steps
    taken: list[list[list[Action]]] = [[[FULL for _ in groups] for _ in blocks] for _ in range(num_steps)]
    used: list[list[set[tuple[object, ...]]]] = [[set() for _ in blocks] for _ in range(num_steps)]
    for block, group in itertools.product(blocks, groups):
        out_made = residual_made = None
        for step in range(num_steps):
            action = assignment.actions[int(rows[step, block, group])]
            age = {True: out_made, False: residual_made}[action.reuse]
            missing = age is None or step - age > limit
            if (block, step) in forced or ((action.reuse or action.residual) and missing):
                action = FULL
            if not action.reuse:
                out_made = step
            if action.method is None and not action.reuse:
                residual_made = step
            taken[step][block][group] = action
    for step, block in itertools.product(range(num_steps), blocks):
        whole = all(action.reuse for action in taken[step][block])
        for group, action in enumerate(taken[step][block]):
            if action.reuse:
                used[step][block].add(("module",) if whole else ("out", group))
            if action.residual:
                used[step][block].add(("residual", action.method, group))
    needed: list[list[set[tuple[object, ...]]]] = [[set() for _ in blocks] for _ in range(num_steps)]
    for step, block in itertools.product(range(num_steps), blocks):
        for later in range(step + 1, num_steps):
            made = set()  # again, between now and then
            for between in range(step + 1, later):
                made |= made_at(taken[between][block])
            needed[step][block] |= {what for what in used[later][block] if what[:1] + what[-1:] not in made}
    return Simulated(taken, needed, used)


def made_at(actions: list[Action]) -> set[tuple[object, ...]]:
    """What a layer computes at a step, as (kind, group)."""
    made: set[tuple[object, ...]] = set()
    if not all(action.reuse for action in actions):
        made.add(("module", "module"))
    for group, action in enumerate(actions):
        if not action.reuse:
            made.add(("out", group))
        if action.method is None and not action.reuse:
            made.add(("residual", group))
    return made


def kept_after(course: Course, step: int, block: int) -> set[tuple[object, ...]]:
    """What the course says is needed after a step."""
    kept: set[tuple[object, ...]] = {("module",)} if course.keep_module[step, block] else set()
    kept |= {("out", group) for group in course.keep_heads[step, block].nonzero().flatten().tolist()}
    for group, methods in enumerate(course.keep_residuals[step][block]):
        kept |= {("residual", method, group) for method in methods}
    return kept


RUNS = [
    pytest.param(seed, num_steps, max_age, forced, id=f"{seed}, {num_steps} steps, age {max_age}, {len(forced)} forced")
    for seed, (num_steps, max_age, forced) in enumerate(
        [(7, None, set()), (7, 1, set()), (13, 2, set()), (4, None, {(0, 0), (1, 2), (2, 3)}), (9, 3, {(1, 4), (1, 5)})]
        * 4
    )
]
each_run = pytest.mark.parametrize(("seed", "num_steps", "max_age", "forced"), RUNS)


@each_run
def test_what_heads_do_and_keep_is_what_a_simulation_does_and_needs(
    seed: int, num_steps: int, max_age: int | None, forced: set[tuple[int, int]]
) -> None:
    assignment = random_assignment(seed)
    course = course_of(assignment, num_steps, full=lambda block, step: (block, step) in forced, max_age=max_age)
    expected = simulate(assignment, num_steps, max_age, forced)
    for step, block in itertools.product(range(num_steps), range(assignment.blocks)):
        heads = {group: part.action for part in course.parts(step, block) for group in part.groups}
        assert [heads[group] for group in range(assignment.groups)] == expected.taken[step][block]
        assert kept_after(course, step, block) == expected.needed[step][block], (step, block)
        before = expected.needed[step - 1][block] if step else set()
        assert expected.used[step][block] <= before
        shares = all(action.share for action in expected.taken[step][block])
        assert course.shares(step, block) == (shares and step > 0)


@each_run
@pytest.mark.parametrize("layout", ["no guidance", "batched", "separate"])
def test_the_peak_is_that_of_a_simulated_run(
    seed: int, num_steps: int, max_age: int | None, forced: set[tuple[int, int]], layout: str
) -> None:
    assignment = random_assignment(seed)
    course = course_of(assignment, num_steps, full=lambda block, step: (block, step) in forced, max_age=max_age)
    told = simulate(assignment, num_steps, max_age, forced)
    sizes = {"module": 40.0, "shared": 40.0, "out": 12.0 / assignment.groups, "residual": 12.0 / assignment.groups}
    branches = ("cond", "uncond") if layout == "separate" else ("batched",)
    held: dict[tuple[str, int], dict[tuple[object, ...], Made]] = {}
    halves: set[Made] = set()
    most = 0.0
    for step, branch, block in itertools.product(range(num_steps), branches, range(assignment.blocks)):
        actions, needed = told.taken[step][block], told.needed[step][block]
        shares = step > 0 and all(action.share for action in actions)
        own = held.setdefault((branch, block), {})
        made = {what for what in needed if (what[0], what[-1]) in made_at(actions)}
        if shares and branch == "uncond":
            other = held["cond", block]
            own |= {what: other[what] for what in made}
            other.pop(("shared",))
        else:
            own |= {what: Made((block, *what), step, branch) for what in made}
            if shares and branch == "cond":
                own["shared",] = own.get(("module",), Made((block, "shared"), step, branch))
            if shares and branch == "batched" and layout == "batched":
                halves |= {own[what] for what in made}
        for what in set(own) - needed - {("shared",)}:
            del own[what]
        alive = {made for kept in held.values() for made in kept.values()}
        most = max(most, sum(sizes[str(one.what[1])] * (0.5 if one in halves else 1.0) for one in alive))
    guided, separate = layout != "no guidance", layout == "separate"
    assert course.peak(40.0, 12.0, guided=guided, separate=separate) == pytest.approx(most / len(branches))


def test_a_layer_whose_head_became_full_shares_no_longer() -> None:
    shared = Action(BAND, residual=True, share=True)
    assignment = Assignment((FULL, RESIDUAL, shared), torch.tensor([[[0, 0]], [[0, 1]], [[2, 2]]]))
    assert course_of(assignment, 3).shares(2, 0)
    course = course_of(assignment, 3, max_age=1)
    assert [part.action for part in course.parts(2, 0)] == [shared, FULL]
    assert not course.shares(2, 0)


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("keep", ["device", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_waits_comes_back_as_it_was(keep: Keep, dtype: torch.dtype) -> None:
    for x in (tensor(2, 5, 3, 8), tensor(2, 3, 5, 8).transpose(1, 2), tensor(2, 5, 3, 8)[:, :, 1:2], tensor(4, 8)[:2]):
        x = x.to(dtype)
        kept = put_by(x, keep)
        assert torch.equal(kept.restored(), x)
        assert kept.restored().dtype == dtype
        assert kept.nbytes == kept.values.untyped_storage().nbytes() == bytes_of(x.numel() / 8, 8, x.itemsize, keep)


@pytest.mark.parametrize("inference", [False, True], ids=["no grad", "inference mode"])
def test_a_view_is_copied_that_its_tensor_may_go(inference: bool) -> None:
    with torch.inference_mode(inference):
        whole = torch.zeros(4, 5, 8)
        kept = put_by(whole[:2], "device")  # contiguous, yet half of what lies in memory
        assert kept.values.untyped_storage().nbytes() == whole.nbytes // 2
        assert put_by(whole, "device").values is whole


def test_the_host_keeps_a_copy() -> None:
    x = tensor(3, 8)
    kept = put_by(x, "cpu")
    x.zero_()
    assert kept.restored().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [1.0, 1e-30, 3e38], ids=["usual", "tiny", "huge"])
def test_eight_bits_round_within_a_share_of_each_row(dtype: torch.dtype, size: float) -> None:
    x = tensor(3, 7, 2, 40)
    x = (x / x.abs().max() * size * torch.logspace(-3, 0, 7)[:, None, None]).to(dtype)
    kept = put_by(x, "8bit")
    error = (kept.restored().double() - x.double()).abs()
    largest = x.double().abs().amax(-1, keepdim=True)
    rounding = 2.0**-4 + 2 * torch.finfo(dtype).eps  # three bits after the leading one
    assert (error <= x.double().abs() * rounding + largest * 2.0**-9 / 448).all()
    assert kept.restored().dtype == dtype
    assert kept.nbytes == bytes_of(3 * 7 * 2, 40, x.itemsize, "8bit")


def test_rows_of_zeros_stay_zeros_in_eight_bits() -> None:
    x = tensor(4, 16)
    x[1] = 0
    back = put_by(x, "8bit").restored()
    assert not back[1].any()
    assert back.isfinite().all()
