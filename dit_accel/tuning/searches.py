"""The searches by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from dit_accel.tuning import greedy, per_head
from dit_accel.tuning.meter import Meter
from dit_accel.tuning.rehearsal import Searched
from dit_accel.tuning.runner import Runner
from dit_accel.tuning.search import Found, Options, best_of, search

Search = Callable[[Runner, Options], Found]


def published(find: Callable[..., Searched], runner: Runner, options: Options, **settings: Any) -> Found:
    """A search that tries every step as one run of all prompts comes to it, by a threshold; its plan is then measured.

    Raises:
        ValueError: what the search refuses, or a plan that does not meet the budget, where there is one.
    """
    searched = find(runner.pipe, runner.together, delta=options.delta, backend=runner.facts.backend, **settings)
    runner.report(f"searched by {searched.forwards} forwards in {searched.seconds:.1f} s")
    meter = Meter(runner)
    meter.time_again()
    point = meter.timed_again(meter.point(searched.assignment))
    best = point if options.budget is None else best_of([point], options.budget)
    return Found(best, [point], meter.dense_seconds)


SEARCHES: Mapping[str, Search] = {
    "own": search,
    "greedy": functools.partial(published, greedy.search, metric="relative"),
    "greedy-signed": functools.partial(published, greedy.search, metric="relative_signed"),
    "per_head": functools.partial(published, per_head.search),
}
