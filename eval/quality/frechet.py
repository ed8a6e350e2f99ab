"""FID (Heusel et al. 2017): how far apart two sets of frames are, as Gaussians in the features of a network."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit_accel.eval.quality.metrics import SetMetric, SetScore
from dit_accel.eval.quality.weights import visiting

Gaussian = tuple[Tensor, Tensor]  # mean [features] and covariance [features, features], float64
_BATCH = 16  # frames at once


def fid(network: str | os.PathLike[str], statistics: str | os.PathLike[str] | None = None) -> SetMetric:
    """The metric ``fid``: the Fréchet distance of the frames of all clips from the frames of all references.

    Args:
        network: TorchScript file of the feature network, uint8 [N, 3, H, W] of any size -> [N, features]. It is called
            with ``return_features=True`` where it has that argument, as ``inception-2015-12-05.pt`` has.
        statistics: of a data set's images in the same features, ``.npz`` with ``mu`` and ``sigma``, to take the
            distance from instead. Default: the references.

    Raises:
        ValueError: when a file is missing or of another kind.
    """
    path = Path(network).expanduser()
    if not path.is_file():
        raise ValueError(f"fid needs the network file {network}, which does not exist; correct the path.")
    try:
        features = torch.jit.load(path, map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(f"fid cannot read {network} as TorchScript; give a file that torch.jit.save wrote.") from error
    target = None if statistics is None else _read_statistics(Path(statistics).expanduser())
    return SetMetric(
        "fid",
        higher_is_better=False,
        unit="",
        dependencies=(),
        start=lambda: FrechetDistance(features, target),
    )


def _read_statistics(path: Path) -> Gaussian:
    if not path.is_file():
        raise ValueError(f"fid needs the statistics file {path}, which does not exist; correct the path.")
    try:
        with np.load(path) as stored:
            return torch.from_numpy(stored["mu"]).double(), torch.from_numpy(stored["sigma"]).double()
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"fid needs statistics with the arrays mu and sigma, which {path} does not hold.") from error


class FrechetDistance:
    """Accumulator of ``fid``: sums and products of features in float64, whatever the number of frames.

    Args:
        network: uint8 [N, 3, H, W] -> [N, features].
        target: what the distance is taken from. Default: the references.
    """

    def __init__(self, network: torch.jit.ScriptModule, target: Gaussian | None = None) -> None:
        self._network, self._target = network, target
        names = [argument.name for argument in network.forward.schema.arguments]  # type: ignore[attr-defined]
        self._options = {"return_features": True} if "return_features" in names else {}
        self._frames, self._references = Moments(), Moments()

    def add(self, frames: Tensor, reference: Tensor | None, prompt: str | None = None) -> None:
        """One clip, float [T, H, W, 3] in [0, 1], and its reference."""
        self._frames.add(self._features(frames))
        if self._target is None and reference is not None:
            self._references.add(self._features(reference))

    def result(self) -> SetScore:
        """The distance; skipped where fewer frames than features leave a covariance without full rank."""
        samples = self._frames.count
        if self._target is None:
            samples = min(samples, self._references.count)
        lack = self._lack(samples)
        if lack:
            return SetScore(None, skipped=f"fid needs {lack}.", samples=samples)
        target = self._references.gaussian() if self._target is None else self._target
        return SetScore(frechet_distance(*self._frames.gaussian(), *target), samples=samples)

    def _lack(self, samples: int) -> str | None:
        features = self._frames.features
        if samples == 0:
            return "clips and reference clips" if self._target is None else "clips"
        if self._target is not None and self._target[1].shape != (features, features):
            return f"statistics of its network's {features} features, got {len(self._target[0])}"
        if samples <= features:
            return f"at least {features + 1} frames of each set, one more than features, got {samples}"
        return None

    def _features(self, clip: Tensor) -> Tensor:
        """[T, features], on the CPU."""
        with torch.no_grad(), visiting(self._network, clip.device):
            pixels = (clip.movedim(-1, 1) * 255).round().to(torch.uint8)
            return torch.cat([self._network(part, **self._options).flatten(1).cpu() for part in pixels.split(_BATCH)])


class Moments:
    """Count, sum and sum of products of vectors that are added in parts."""

    def __init__(self) -> None:
        self.count = 0
        self._sum, self._products = torch.zeros(0), torch.zeros(0, 0)

    @property
    def features(self) -> int:
        """Length of the vectors; 0 before the first."""
        return len(self._sum)

    def add(self, vectors: Tensor) -> None:
        """[N, features] more."""
        vectors = vectors.double()
        if not self.count:
            self._sum = vectors.new_zeros(vectors.shape[1])
            self._products = vectors.new_zeros(2 * vectors.shape[1:])
        self.count += len(vectors)
        self._sum += vectors.sum(0)
        self._products += vectors.T @ vectors

    def gaussian(self) -> Gaussian:
        """Mean [features] and unbiased covariance [features, features]."""
        mean = self._sum / self.count
        return mean, (self._products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(mean_x: Tensor, covariance_x: Tensor, mean_y: Tensor, covariance_y: Tensor) -> float:
    """|mean_x - mean_y|^2 + trace(cov_x + cov_y - 2 (cov_x cov_y)^(1/2)) of two Gaussians, in float64.

    The root's trace is taken from the symmetric cov_x^(1/2) cov_y cov_x^(1/2), which has the same eigenvalues: they are
    real, and the negative ones that rounding leaves are zero.
    """
    values, vectors = torch.linalg.eigh(covariance_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ covariance_y @ root).clamp(min=0).sqrt().sum()
    distance = (mean_x - mean_y).square().sum() + covariance_x.trace() + covariance_y.trace() - 2 * shared
    return float(distance)
