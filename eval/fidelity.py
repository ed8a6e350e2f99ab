"""How far a run's sparse attention is from dense attention: per block and head, and per denoising step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dit_accel.eval.quality import Score
from dit_accel.methods.fidelity import OutputSums, ProbedCall

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """A property of sparse attention calls.

    Args:
        title: what it is, for people.
        style: format of its values.
        higher_is_better: default no.
    """

    title: str
    style: str = ".1%"
    higher_is_better: bool = False

    @property
    def distance_title(self) -> str:
        """What ``distance`` is, for people."""
        return f"1 - {self.title}" if self.higher_is_better else self.title

    def distance(self, values: Array) -> Array:
        """How far from dense attention the values are, 0 for not at all."""
        return 1 - values if self.higher_is_better else values


MASS, ERROR, COSINE = "discarded_mass", "attention_error", "attention_cosine"
MEASURES = {  # by key in a record's quality
    MASS: Measure("softmax mass left out"),
    ERROR: Measure("relative error of the output"),
    COSINE: Measure("cosine to the dense output", style=".4f", higher_is_better=True),
}
ENTRIES = frozenset(key for name in MEASURES for key in (name, f"{name}_by_step"))  # keys in a record's quality


@dataclass(frozen=True, eq=False)
class Profile:
    """One measure in one run; NaN where no call was sparse.

    Args:
        by_head: [blocks, heads]: of all calls of a head, those of all steps and guidance branches.
        by_step: [steps]: the mean over blocks and heads.
    """

    by_head: Array
    by_step: Array

    @property
    def mean(self) -> float:
        """Over blocks and heads."""
        return float(np.nanmean(self.by_head))


@dataclass(frozen=True, eq=False)
class Fidelity:
    """What a run measured of its sparse calls, a profile by name of measure."""

    profiles: Mapping[str, Profile]

    def __getitem__(self, name: str) -> Profile:
        return self.profiles[name]

    def worst(self, name: str) -> tuple[int, int]:
        """Block and head that are farthest from dense attention in a measure."""
        by_head = self[name].by_head
        block, head = np.unravel_index(np.nanargmax(MEASURES[name].distance(by_head)), by_head.shape)
        return int(block), int(head)

    def __str__(self) -> str:
        return "; ".join(self._sentence(name) for name in self.profiles)

    def _sentence(self, name: str) -> str:
        measure, place = MEASURES[name], self.worst(name)
        mean, extreme = (format(value, measure.style) for value in (self[name].mean, self[name].by_head[place]))
        most = "least" if measure.higher_is_better else "most"
        return f"{measure.title} {mean}, {most} {extreme} in block {place[0]}, head {place[1]}"

    def scores(self) -> dict[str, Score]:
        """As entries of a record's quality: each mean, with the parts block by block and step by step."""
        return {
            key: score
            for name, profile in self.profiles.items()
            for key, score in (
                (name, Score(profile.mean, tuple(profile.by_head.ravel().tolist()))),
                (f"{name}_by_step", Score(float(np.nanmean(profile.by_step)), tuple(profile.by_step.tolist()))),
            )
        }


def fidelity_of(quality: Mapping[str, Mapping[str, Any]], heads: int) -> Fidelity | None:
    """What a record's quality says of a model with so many heads; None where no measure is there with its parts."""
    profiles = {}
    for name in MEASURES:
        parts = [np.array(quality.get(key, {}).get("values", ()), np.float64) for key in (name, f"{name}_by_step")]
        if all(part.size for part in parts):
            profiles[name] = Profile(parts[0].reshape(-1, heads), parts[1])
    return Fidelity(profiles) if profiles else None


def gather(calls: Sequence[ProbedCall], *, blocks: int, steps: int, batch: int = 1) -> list[Fidelity]:
    """The fidelity of each sample of a run.

    Where calls count together, so do their outputs: an error of several calls is that of all their queries at once,
    not the mean of their errors, which calls with an output near zero would dominate.

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
    sums = torch.stack([_sums(call).unflatten(0, (-1, batch)).sum(0) for call in calls]).cpu().double()
    at = (torch.tensor([call.step for call in calls]), torch.tensor([call.block for call in calls]))
    cells = sums.new_zeros(steps, blocks, *sums.shape[1:]).index_put(at, sums, accumulate=True)
    by_head, by_step = _measures(cells.sum(0)), _measures(cells)  # [block, sample, head], [step, block, sample, head]
    return [
        Fidelity(
            {
                name: Profile(by_head[name][:, sample].numpy(), by_step[name][:, :, sample].nanmean((1, 2)).numpy())
                for name in MEASURES
            }
        )
        for sample in range(batch)
    ]


def average(runs: Sequence[Fidelity]) -> Fidelity:
    """The mean over runs of the same settings, of the measures that all of them have."""
    names = [name for name in runs[0].profiles if all(name in run.profiles for run in runs)]
    return Fidelity(
        {
            name: Profile(
                np.mean([run[name].by_head for run in runs], axis=0),
                np.mean([run[name].by_step for run in runs], axis=0),
            )
            for name in names
        }
    )


def _sums(call: ProbedCall) -> Tensor:
    """Queries, their discarded mass and the sums of their outputs, [B, H, sums]."""
    mass = call.mass.float()
    queries = torch.full_like(mass[..., 0], mass.shape[-1])
    return torch.stack([queries, mass.sum(-1), *(part.float() for part in call.sums)], -1)


def _measures(sums: Tensor) -> dict[str, Tensor]:
    """Each measure from sums [..., sums], by its name; NaN without a query."""
    queries, mass, *output = sums.unbind(-1)
    of_output = OutputSums(*output)
    values = {MASS: mass / queries, ERROR: of_output.error, COSINE: of_output.cosine}
    return {name: value.where(queries > 0, torch.nan) for name, value in values.items()}
