"""Who may use the device: one at a time, in the order of arrival, each seeing how many are before."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

MOST_WAITING = 16


class Line:
    """A waiting line. ``join`` gives a place in it; the first in line may work.

    Args:
        most: how many may stand in it, the one at work included. Default 16.
    """

    def __init__(self, most: int = MOST_WAITING) -> None:
        self._most = most
        self._places: deque[object] = deque()
        self._moved = threading.Condition()

    def __len__(self) -> int:
        return len(self._places)

    @contextmanager
    def join(self) -> Iterator[Place]:
        """A place at the end, given up at the end of the block.

        Raises:
            ValueError: a full line.
        """
        place = Place(self)
        with self._moved:
            if len(self._places) >= self._most:
                raise ValueError(f"{self._most} runs are waiting already; try again in a few minutes.")
            self._places.append(place)
        try:
            yield place
        finally:
            with self._moved:
                self._places.remove(place)
                self._moved.notify_all()

    def before(self, place: object) -> int:
        """How many are before a place."""
        with self._moved:
            return self._places.index(place)

    def wait(self, seconds: float) -> None:
        """Until the line moves, or so long."""
        with self._moved:
            self._moved.wait(seconds)


class Place:
    """One place in a line."""

    def __init__(self, line: Line) -> None:
        self._line = line

    @property
    def before(self) -> int:
        """How many are to go first; 0: it is this one's turn."""
        return self._line.before(self)
