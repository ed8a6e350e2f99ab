"""Where a number was measured: hardware, versions, and the source it ran from."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("dit-accel", "torch", "diffusers", "transformers", "triton")


def machine() -> dict[str, str]:
    """Facts of this machine by label: cpu, cores, platform, and with a GPU its name, memory and driver."""
    facts = {"cpu": _cpu_name(), "cores": str(len(os.sched_getaffinity(0))), "platform": platform.platform()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {
            "gpu": f"{torch.cuda.device_count()} x {properties.name}",
            "gpu memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "driver": _driver_version(),
        }
    return facts


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that speed depends on; "not installed" where one is missing."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@functools.cache  # two git processes; what a process has loaded does not change
def source_version() -> str:
    """The git commit of the checkout this package runs from, "-dirty" when edited; else the package version."""
    here = Path(__file__).resolve()
    # An installed copy may lie inside somebody else's repository: only a tracked file speaks for the commit.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name):
        return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return versions()["dit-accel"]


def _git(folder: Path, *arguments: str) -> str:
    """Output of a git command, "" where git is missing or refuses."""
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def _driver_version() -> str:
    info = Path("/proc/driver/nvidia/version")
    named = re.search(r"Kernel Module\D.*?\b(\d+\.\d[\d.]*)", info.read_text()) if info.exists() else None
    return named[1] if named else "unknown"
