"""A search for a plan as a process of its own: it can be stopped at any time and leaves nothing behind."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dit_accel.demo.line import Line
from dit_accel.demo.workshop import Stopped, turn

BUDGETS = {"PSNR to keep, in dB": "psnr", "Speed-up to reach": "speedup", "Seconds to stay within": "seconds"}
MOST_MINUTES = 30.0
_PLACES = ("plan: ", "curve: ", "picture: ", "use it: ")  # lines that say where files are, which a visitor cannot use
_TAIL = 12  # lines of the log that an error shows at most


@dataclass(frozen=True, kw_only=True)
class Search:
    """What ``dit-accel tune`` is asked for.

    Args:
        model: name.
        budget: a key of ``BUDGETS``, and its value.
        minutes: begin no run that would end later.
        prompts: to measure on.
        height, width, num_frames, steps: of the output; 0: the model's own.
        device: "cuda" or "cpu".
    """

    model: str
    budget: tuple[str, float]
    minutes: float
    prompts: int
    height: int
    width: int
    num_frames: int
    steps: int
    device: str

    def command(self, output: Path) -> list[str]:
        """The arguments of ``dit-accel``.

        Raises:
            ValueError: more minutes or prompts than one visitor may have.
        """
        if not 0 < self.minutes <= MOST_MINUTES or not 1 <= self.prompts <= 8:
            raise ValueError(
                f"a search takes up to {MOST_MINUTES:g} minutes and 1 to 8 prompts here, got {self.minutes:g} and "
                f"{self.prompts}; ask for less, or run dit-accel tune."
            )
        kind, value = self.budget
        given = {
            "model": self.model,
            "budget": f"{BUDGETS[kind]}={value:g}",
            "minutes": f"{self.minutes:g}",
            "prompts": str(self.prompts),
            "device": self.device,
            "output": str(output),
        }
        sizes = {"height": self.height, "width": self.width, "num-frames": self.num_frames, "steps": self.steps}
        given |= {name: str(size) for name, size in sizes.items() if size}
        return ["tune", *(word for name, value in given.items() for word in (f"--{name}", value))]


@dataclass(frozen=True)
class Tuned:
    """What a search leaves: its log, its plan and the picture of its curve."""

    log: str
    plan: Path
    picture: Path


def tune(search: Search, folder: Path, line: Line, stop: threading.Event) -> Iterator[str | Tuned]:
    """Runs the search in turn with everything else; yields what it does in words, at the end what it found.

    Raises:
        ValueError: what the search refuses, in its own words.
        Stopped: after ``stop`` was set.
    """
    output = folder / "plan.json"
    command = [sys.executable, "-m", "dit_accel.cli", *search.command(output)]
    with line.join() as place:
        yield from turn(line, place, stop)
        began = time.monotonic()
        lines: queue.Queue[str] = queue.Queue()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        log: list[str] = []
        try:
            while process.poll() is None:
                if stop.wait(0.5):
                    raise Stopped
                log += _drained(lines)
                yield f"searching for {time.monotonic() - began:.0f} s, at most about {60 * search.minutes:.0f} s"
        finally:
            process.kill()
            process.wait()
            reader.join()
    log += _drained(lines)
    if process.returncode:
        raise ValueError(_reason(log))
    said = [line for line in log if not line.startswith(_PLACES)]
    yield Tuned("\n".join(said), output, output.with_suffix(".curve.png"))


def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert process.stdout is not None, "piped"
    for line in process.stdout:
        lines.put(line.rstrip())


def _drained(lines: queue.Queue[str]) -> list[str]:
    found = []
    while not lines.empty():
        line = lines.get()
        if "Loading" not in line:  # progress bars of libraries
            found.append(line)
    return found


def _reason(log: Sequence[str]) -> str:
    """The sentence with which the command refused, or the end of its log."""
    said = [line.partition("tune: ")[2] for line in log if line.startswith("dit-accel tune: ")]
    return said[-1] if said else "the search failed: " + " ".join(log[-_TAIL:])
