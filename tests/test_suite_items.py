"""Chunks and their shares: every sample once, the same whatever the number of processes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from dit_accel.eval.suite.items import Chunk, Sample, chunks, is_probed, is_shown, share
from dit_accel.eval.suite.schema import Setting, Suite

SUITE = Suite(
    name="try",
    models=("one", "two"),
    methods=("draft",),
    settings=(Setting(name="small"), Setting(name="large", height=64)),
    prompts=("a", "b", "c", "d", "e"),
    seeds=(3, 0),
    runs=0,
    batch=2,
)
BATCHES = (1, 2, 3, 5, 8)


def samples_of(parts: list[Chunk]) -> list[tuple[str, str, Sample]]:
    return [(part.model, part.setting.name, sample) for part in parts for sample in part.samples]


def test_chunks_of_a_small_suite() -> None:
    small = replace(SUITE, models=("one",), settings=SUITE.settings[:1], prompts=("a", "b", "c"))
    numbers = [[(sample.seed, sample.number, sample.noise) for sample in chunk.samples] for chunk in chunks(small)]
    assert numbers == [
        [(3, 0, 30_000), (3, 1, 30_001)],
        [(3, 2, 30_002)],
        [(0, 0, 0), (0, 1, 1)],
        [(0, 2, 2)],
    ]


@pytest.mark.parametrize("batch", BATCHES)
def test_every_sample_is_in_one_chunk_whatever_the_batch(batch: int) -> None:
    expected = [
        (model, setting.name, Sample(number, text, seed, 10_000 * seed + number))
        for model, setting, seed, (number, text) in product(
            SUITE.models, SUITE.settings, SUITE.seeds, enumerate(SUITE.prompts)
        )
    ]
    parts = chunks(replace(SUITE, batch=batch))
    assert samples_of(parts) == expected
    assert max(len(part.samples) for part in parts) == min(batch, len(SUITE.prompts))


def test_no_two_samples_of_a_setting_share_their_noise() -> None:
    long = replace(SUITE, prompts=tuple(map(str, range(10_000))), models=("one",), settings=SUITE.settings[:1])
    noises = [sample.noise for _, _, sample in samples_of(chunks(long))]
    assert len(set(noises)) == len(noises) == 20_000


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("batch", BATCHES)
def test_shares_are_disjoint_and_together_everything(batch: int, processes: int) -> None:
    every = chunks(replace(SUITE, batch=batch))
    shares = [share(every, rank, processes) for rank in range(processes)]
    together = [part for mine in shares for part in mine]
    assert len(together) == len(every)
    assert all(part in together for part in every)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(
        every[place] == part
        for rank, mine in enumerate(shares)
        for place, part in zip(range(rank, len(every), processes), mine, strict=True)
    )


@pytest.mark.parametrize(
    "grown",
    [
        replace(SUITE, models=("three", *SUITE.models)),
        replace(SUITE, settings=(Setting(name="new", steps=3), *SUITE.settings)),
        replace(SUITE, seeds=(*SUITE.seeds, 7)),
        replace(SUITE, methods=("radial", "draft")),
        replace(SUITE, prompts=(*SUITE.prompts, "f", "g", "h")),
    ],
    ids=["models", "settings", "seeds", "methods", "prompts"],
)
def test_a_grown_suite_repeats_the_full_chunks(grown: Suite) -> None:
    later = chunks(grown)
    assert all(part in later for part in chunks(SUITE) if len(part.samples) == SUITE.batch)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 9])
def test_a_limit_keeps_the_first_prompts_of_everything(limit: int) -> None:
    kept = samples_of(chunks(SUITE, limit))
    assert kept == [entry for entry in samples_of(chunks(SUITE)) if entry[2].number < limit]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=rf"--limit must be at least 1, got {limit}; leave it out for all prompts\."):
        chunks(SUITE, limit)


def test_chunks_are_the_same_each_time() -> None:
    assert chunks(SUITE) == chunks(replace(SUITE))


def test_clips_and_attention_are_those_of_the_first_prompts_of_the_first_seed() -> None:
    suite = replace(SUITE, show=2, attention=1)
    every = {sample for _, _, sample in samples_of(chunks(suite))}
    assert {(sample.seed, sample.number) for sample in every if is_shown(suite, sample)} == {(3, 0), (3, 1)}
    assert {(sample.seed, sample.number) for sample in every if is_probed(suite, sample)} == {(3, 0)}
