"""The softmax mass that sparse attention leaves out: per block and head, and per denoising step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dit_accel.eval.quality import Score

Array = npt.NDArray[np.float64]

BY_HEAD, BY_STEP = "discarded_mass", "discarded_mass_by_step"  # keys in a record's quality


class SparseCall(Protocol):
    """What one sparse attention call left out: ``mass`` is [samples, heads, query groups] in [0, 1]."""

    @property
    def step(self) -> int: ...
    @property
    def block(self) -> int: ...
    @property
    def mass(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class DiscardedMass:
    """Mean discarded mass tau of one run; NaN where no call was sparse.

    Args:
        by_head: [blocks, heads], averaged over steps, guidance branches and query groups.
        by_step: [steps], averaged over blocks, heads, branches and groups.
    """

    by_head: Array
    by_step: Array

    @property
    def mean(self) -> float:
        return float(np.nanmean(self.by_head))

    @property
    def worst(self) -> tuple[int, int]:
        """Block and head with the most."""
        block, head = np.unravel_index(np.nanargmax(self.by_head), self.by_head.shape)
        return int(block), int(head)

    def __str__(self) -> str:
        block, head = self.worst
        return f"mean {self.mean:.1%}, most {self.by_head[block, head]:.1%} in block {block}, head {head}"

    def scores(self) -> dict[str, Score]:
        """As entries of a record's quality: the mean, with the parts block by block and step by step."""
        return {
            BY_HEAD: Score(self.mean, tuple(self.by_head.ravel().tolist())),
            BY_STEP: Score(float(np.nanmean(self.by_step)), tuple(self.by_step.tolist())),
        }


def discarded_of(quality: Mapping[str, Mapping[str, Any]], heads: int) -> DiscardedMass | None:
    """What a record's quality says of a model with so many heads; None where it was not measured."""
    if BY_HEAD not in quality:
        return None
    by_head, by_step = (np.array(quality[key]["values"], dtype=np.float64) for key in (BY_HEAD, BY_STEP))
    return DiscardedMass(by_head.reshape(-1, heads), by_step)


def gather(calls: Sequence[SparseCall], *, blocks: int, steps: int, batch: int = 1) -> list[DiscardedMass]:
    """The discarded mass of each sample of a run.

    Args:
        calls: all sparse calls of the run; their samples are those of the batch, once or once per guidance branch.
        blocks: transformer blocks of the model.
        steps: denoising steps of the run; a scheduler that calls the model more often has more.
        batch: samples. Default 1.

    Returns:
        One per sample; none without calls.
    """
    if not calls:
        return []
    steps = max(steps, 1 + max(call.step for call in calls))
    masses = [call.mass.float().unflatten(0, (-1, batch)).mean((0, 3)).cpu().numpy() for call in calls]
    at = (np.array([call.step for call in calls]), np.array([call.block for call in calls]))
    sums, counts = np.zeros((steps, blocks, *masses[0].shape)), np.zeros((steps, blocks, 1))
    np.add.at(sums, at, np.stack(masses))  # [step, block, sample, head]
    np.add.at(counts, at, 1)
    with np.errstate(invalid="ignore"):  # 0 / 0: no sparse call there
        by_head = sums.sum(0) / counts.sum(0)[..., None]
        by_step = sums.mean(3).sum(1) / counts.sum(1)
    return [DiscardedMass(by_head[:, sample], by_step[:, sample]) for sample in range(batch)]


def average(masses: Sequence[DiscardedMass]) -> DiscardedMass:
    """The mean over runs of the same settings."""
    return DiscardedMass(
        np.mean([mass.by_head for mass in masses], axis=0), np.mean([mass.by_step for mass in masses], axis=0)
    )
