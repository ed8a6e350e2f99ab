"""What a suite runs, one call of a pipeline after the other, and which process does which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from dit_accel.eval.suite.schema import MOST_PROMPTS, Setting, Suite


@dataclass(frozen=True)
class Sample:
    """One prompt with one seed.

    Args:
        number: place of the prompt in the suite.
        prompt: text.
        seed: one of the suite's.
        noise: seed of the initial latents, of this prompt and seed alone: neither the order of samples, nor the batch,
            nor the number of processes changes it.
    """

    number: int
    prompt: str
    seed: int
    noise: int


@dataclass(frozen=True)
class Chunk:
    """Samples of one call of the pipeline; always sampled whole, so that a run that goes on repeats the same calls.

    Args:
        model: one of the suite's.
        setting: one of the suite's.
        samples: of one seed, prompts in order, at most ``batch`` of them.
    """

    model: str
    setting: Setting
    samples: tuple[Sample, ...]


def chunks(suite: Suite, limit: int | None = None) -> list[Chunk]:
    """All of a suite: models, their settings, seeds, and each seed's prompts in groups of ``batch``.

    A suite with more models, settings, seeds or prompts has the chunks of the smaller one too, up to the last, unfilled
    group of each seed.

    Args:
        suite: with ``batch`` clips at once.
        limit: only so many prompts, the first ones. Default None: all.

    Raises:
        ValueError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}; leave it out for all prompts.")
    prompts = list(enumerate(suite.prompts))[:limit]
    groups = [prompts[start : start + suite.batch] for start in range(0, len(prompts), suite.batch)]
    return [
        Chunk(model, setting, tuple(Sample(number, text, seed, MOST_PROMPTS * seed + number) for number, text in group))
        for model, setting, seed, group in product(suite.models, suite.settings, suite.seeds, groups)
    ]


def share(chunks: Sequence[Chunk], rank: int, processes: int) -> list[Chunk]:
    """The chunks of one of several processes: every ``processes``-th, from ``rank`` on.

    Args:
        chunks: of the whole suite, the same list in each process.
        rank: of this process, from 0.
        processes: number of them.
    """
    return list(chunks[rank::processes])


def is_shown(suite: Suite, sample: Sample) -> bool:
    """Whether the sample's clips are kept for the report."""
    return sample.seed == suite.seeds[0] and sample.number < suite.show


def is_probed(suite: Suite, sample: Sample) -> bool:
    """Whether the sample's attention is compared with dense attention in a run of its own."""
    return sample.seed == suite.seeds[0] and sample.number < suite.attention
