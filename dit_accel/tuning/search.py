"""The search of our own: local errors and times of every candidate, one price for error, and runs that check it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.tuning.budget import Budget, Measured
from dit_accel.tuning.candidates import METHODS, REUSING, Candidate, assignment_of, candidates_for, step_groups
from dit_accel.tuning.choose import Frontier
from dit_accel.tuning.meter import Meter, Point, Predicted
from dit_accel.tuning.profile import Profile, profile
from dit_accel.tuning.runner import Runner
from dit_accel.tuning.times import LayerTimes, RunTimes, measure_layers

DEFAULT_BUDGET = Budget("psnr", 28.0)
CURVE = 4  # points of the curve beside the first guess
ROUNDS = 4  # of bisection at most
CLOSE = 0.01  # of the dense seconds: plans nearer than this are not told apart


@dataclass(frozen=True)
class Options:
    """What a search may try.

    Args:
        budget: what is asked for; None for a search that goes by ``delta``.
        methods: candidates as they are written.
        groups: groups of steps that choose for themselves; None: one for every three steps, at most five.
        delta: threshold of the published searches.
    """

    budget: Budget | None = None
    methods: tuple[str, ...] = METHODS + REUSING
    groups: int | None = None
    delta: float = 0.05

    def step_groups(self, steps: int) -> list[range]:
        return step_groups(steps, max(1, min(5, steps // 3)) if self.groups is None else self.groups)


@dataclass(frozen=True, eq=False)
class Found:
    """What a search ends with.

    Args:
        best: the assignment that meets the budget.
        curve: everything that was tried, from the mildest on.
        dense_seconds: of the denoising loop with dense attention.
    """

    best: Point
    curve: Sequence[Point]
    dense_seconds: float


def search(runner: Runner, options: Options) -> Found:
    """The cheapest assignment that meets a floor of quality, or the best within a limit of time.

    Raises:
        ValueError: no candidate is sparse at this size, the time does not suffice for one plan, or the budget cannot
            be met.
    """
    facts, budget = runner.facts, options.budget or DEFAULT_BUDGET
    groups, candidates = options.step_groups(facts.steps), candidates_for(options.methods, facts)
    if len(candidates) == 1:
        raise ValueError(
            f"every method of {', '.join(options.methods)} is dense on {facts.layout.num_tokens} tokens; "
            "name others by --methods."
        )
    layers, meter = measure_layers(facts, candidates, runner.dense), Meter(runner)
    runner.report(f"dense attention: {meter.dense_seconds:.2f} s; profiling {len(candidates)} candidates")
    _check_needed(runner, budget, meter, len(groups), profiling_seconds(layers, candidates, facts.calls, len(groups)))
    local, _ = profile(runner, candidates, groups)
    error = _end_errors(budget, meter, local, candidates, groups)
    meter.time_again()
    times = calibrated(layers, meter, facts.calls, facts.steps)
    frontier = Frontier(times.table(candidates, groups), error)
    if not frontier.choice(frontier.last).any():
        keeping = f" and keeps {budget}" if budget.kind == "kept_mass" else ""
        raise ValueError(f"no candidate is faster than full attention here{keeping}; stay with dense attention.")

    def tried(position: int) -> Point:
        end = None if budget.kind == "kept_mass" else frontier.error[position]
        predicted = Predicted(times.rest + frontier.seconds[position], end)
        chosen = assignment_of(candidates, frontier.choice(position), groups)
        point = meter.point(chosen, predicted, frontier.multiplier(position))
        runner.report(f"  predicted {meter.dense_seconds / predicted.seconds:.2f}x, measured {point.measured}")
        return point

    guess = _guess(frontier, budget, times.rest, meter.dense_seconds)
    points = explore(frontier, budget, guess, tried, lambda: meter.time_for(runner.prompts))
    met = [number for number, point in enumerate(points) if budget.met(point.measured)]
    if met and meter.time_for(runner.prompts):
        likely = _best(met, points, budget)
        points[likely] = meter.timed_again(points[likely])
    return Found(best_of(points, budget), points, meter.dense_seconds)


def profiling_seconds(layers: Sequence[LayerTimes], candidates: Sequence[Candidate], calls: int, groups: int) -> float:
    """What a profile takes beyond a dense run: every candidate's sparse calls in each layer at the sampled steps."""
    first = {method for candidate in candidates for method in candidate.methods}
    later = [action.method for candidate in candidates for action in candidate.cycle[1:] if action.method is not None]
    return calls * groups * sum(layer.methods[method] for layer in layers for method in [*first, *later])


def calibrated(layers: Sequence[LayerTimes], meter: Meter, calls: int, steps: int) -> RunTimes:
    """Times of layers measured alone, made to agree with the dense runs, and the rest of a run."""
    alone = calls * steps * sum(layer.dense for layer in layers)
    attention = statistics.fmean(sample.attention for sample in meter.dense)
    scaled = {id(layer): layer.scaled(attention / alone) for layer in layers}
    projections = calls * steps * sum(layer.projections for layer in layers)
    rest = max(0.0, meter.dense_seconds - attention - projections)
    return RunTimes([scaled[id(layer)] for layer in layers], calls, rest)


def explore(
    frontier: Frontier,
    budget: Budget,
    guess: int,
    tried: Callable[[int], Point],
    time_left: Callable[[], bool],
) -> list[Point]:
    """Points along the frontier, the guess first, and then ever closer to where the budget is just met."""
    points: dict[int, Point] = {}
    wanted = [guess, *(_position_at(frontier, number / CURVE) for number in range(CURVE, 0, -1))]
    for position in dict.fromkeys(wanted):
        if position == 0 < frontier.last:
            continue  # full attention everywhere
        if not points or time_left():
            points[position] = tried(position)
    for _ in range(ROUNDS):
        middle = _between(frontier, budget, points)
        if middle is None or not time_left():
            break
        points[middle] = tried(middle)
    return [points[position] for position in sorted(points)]


def best_of(points: Sequence[Point], budget: Budget) -> Point:
    """The fastest of those that keep the quality, or the best of those within the time.

    Args:
        points: from the mildest to what is predicted to be the fastest.
        budget: what is asked for.

    Raises:
        ValueError: none does, or none that does is faster than dense attention.
    """
    faster = [number for number, point in enumerate(points) if point.measured.speedup > 1]
    met = [number for number in faster if budget.met(points[number].measured)]
    if met:
        return points[_best(met, points, budget)]
    if budget.of_quality:
        closest = min((point.measured for point in points), key=_loss)
        raise ValueError(
            f"no plan keeps {budget} and is faster than dense attention here, the nearest reached {closest}; ask for "
            "less, name other --methods or stay with dense attention."
        )
    fastest = min((point.measured for point in points), key=lambda m: m.seconds)
    raise ValueError(
        f"no plan reaches {budget}, the fastest took {fastest.seconds:.2f} s with {fastest}; ask for less or name "
        "other --methods."
    )


def _check_needed(runner: Runner, budget: Budget, meter: Meter, groups: int, profiling: float) -> None:
    """Raise a ValueError where the limit of time is met already, or one plan would take longer than there is."""
    if budget.kind == "seconds" and meter.dense_seconds <= budget.value:
        raise ValueError(
            f"dense attention takes {meter.dense_seconds:.2f} s here, within {budget}; nothing needs tuning."
        )
    needed = profiling + (1 + groups + 2 * runner.prompts) * meter.run_seconds
    if not runner.time_for(needed):
        raise ValueError(
            f"one plan takes about {needed / 60:.1f} minutes more at {meter.run_seconds:.1f} s a run; pass more "
            "--minutes, fewer --methods or fewer prompts."
        )


def _best(met: Sequence[int], points: Sequence[Point], budget: Budget) -> int:
    measured = [point.measured for point in points]
    return min(met, key=lambda n: measured[n].seconds if budget.of_quality else _loss(measured[n]))


def _loss(measured: Measured) -> float:
    """What is least for the best quality."""
    return measured.relative_error if measured.psnr is None else -measured.psnr


def _end_errors(
    budget: Budget, meter: Meter, local: Profile, candidates: Sequence[Candidate], groups: Sequence[range]
) -> Tensor:
    """What each choice adds to the error at the end, [groups, blocks, candidates].

    Local errors are weighed by their group, from one run for each that is sparse there alone. Under a kept mass a
    choice is allowed or not.
    """
    if budget.kind == "kept_mass":
        return torch.where(local.mass.mean(2) >= budget.value, 0.0, torch.inf).double()
    total = local.error.sum(2)
    simple = [index for index, candidate in enumerate(candidates) if candidate.methods and len(candidate.cycle) == 1]
    by_error = sorted(simple or range(1, len(candidates)), key=lambda index: float(total[..., index].sum()))
    probe = by_error[len(by_error) // 2]
    weighed = []
    for group in range(len(groups)):
        choice = torch.zeros(total.shape[:2], dtype=torch.int64)
        choice[group] = probe
        end = meter.end_error(assignment_of(candidates, choice, groups))
        weighed.append(total[group] * end / max(float(total[group, :, probe].sum()), 1e-12))
    return torch.stack(weighed)


def _guess(frontier: Frontier, budget: Budget, rest: float, dense_seconds: float) -> int:
    """Where the budget is met if the prediction holds."""
    if budget.kind == "psnr":
        return frontier.within_error(10 ** (-budget.value / 10))
    if budget.kind == "relative_error":
        return frontier.within_error(budget.value**2)
    if budget.kind == "kept_mass":
        return 0
    seconds = budget.value if budget.kind == "seconds" else dense_seconds / budget.value
    return frontier.within_seconds(seconds - rest)


def _position_at(frontier: Frontier, share: float) -> int:
    """The position that saves such a share of what the fastest one saves."""
    most, least = frontier.seconds[0], frontier.seconds[-1]
    return frontier.within_seconds(most - share * (most - least))


def _between(frontier: Frontier, budget: Budget, points: dict[int, Point]) -> int | None:
    """A position halfway between the two tried ones where the budget begins or ceases to be met; None if they touch."""
    mild = [position for position, point in points.items() if budget.met(point.measured) == budget.of_quality]
    low = max(mild, default=0)
    high = min((position for position in points if position > low), default=None)
    if high is None:
        return None
    seconds = frontier.seconds
    middle = frontier.within_seconds((seconds[low] + seconds[high]) / 2)
    close = seconds[low] - seconds[high] < CLOSE * seconds[0]
    return None if close or not low < middle < high else middle
