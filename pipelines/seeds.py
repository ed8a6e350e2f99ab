"""Random generators by number, so that what a run draws depends on where it is and not on how it came there."""

from __future__ import annotations

import numpy as np
import torch


def generator(device: torch.device | str, *numbers: int) -> torch.Generator:
    """A generator on ``device`` for ``numbers``, such as a run's seed and a batch's number, each at least 0."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)
