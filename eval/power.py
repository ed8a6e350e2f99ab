"""Clock and power of the GPU while something runs, read by nvidia-smi beside it."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import NamedTuple

import torch

QUERY = "timestamp,clocks.sm,power.draw.instant"
EVERY_MS = 20


class Sample(NamedTuple):
    """Clock in MHz and power in W at a time as ``time.time()`` gives it."""

    time: float
    clock: float
    power: float


@contextmanager
def power_log(device: torch.device) -> Iterator[list[Sample]]:
    """A list that holds the samples once the block has ended; empty on a CPU or without nvidia-smi."""
    samples: list[Sample] = []
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        yield samples
        return
    uuid = torch.cuda.get_device_properties(device).uuid
    query = [f"--id=GPU-{uuid}", f"--query-gpu={QUERY}", f"--loop-ms={EVERY_MS}", "--format=csv,noheader,nounits"]
    with tempfile.TemporaryFile() as output:  # a pipe would fill up and stop it
        with subprocess.Popen(["nvidia-smi", *query], stdout=output) as process:
            try:
                yield samples
            finally:
                process.terminate()
        output.seek(0)
        lines = output.read().decode().splitlines()
    samples += [sample for line in lines if (sample := parse(line)) is not None]


def parse(line: str) -> Sample | None:
    """A line of nvidia-smi; None for one that was cut off or holds no number."""
    try:
        stamp, clock, power = line.split(", ")
        return Sample(datetime.strptime(stamp, "%Y/%m/%d %H:%M:%S.%f").timestamp(), float(clock), float(power))
    except ValueError:
        return None


def during(samples: list[Sample], spans: list[tuple[float, float]]) -> tuple[float, float] | None:
    """Median clock and power of the samples inside the spans of time; None where there is none."""
    inside = [sample for sample in samples if any(begin <= sample.time <= end for begin, end in spans)]
    if not inside:
        return None
    return statistics.median(sample.clock for sample in inside), statistics.median(sample.power for sample in inside)
