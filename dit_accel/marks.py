"""Moments on a device's own clock, taken without making it wait."""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """Now, on the device's own clock; on a GPU an event of its stream, read later, so that no loop waits."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(begin: Mark, end: Mark) -> float:
    """Seconds from one mark to a later one of the same device; on a GPU it waits for the later one."""
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
    assert isinstance(begin, float) and isinstance(end, float), "both marks come from one device"
    return end - begin
