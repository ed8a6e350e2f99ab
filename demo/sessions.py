"""What belongs to one browser session: its folder, its history, and how its run is stopped."""

from __future__ import annotations

import secrets
import shutil
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from dit_accel.demo.workshop import Comparison

REMEMBERED = 8  # comparisons
MOST_SESSIONS = 64


@dataclass(eq=False)
class Session:
    """One visitor.

    Args:
        token: names its files.
        folder: of its files.
        stop: set to stop its run at the next step.
        history: its comparisons, the latest last.
        shown: the one on the page.
        running: whether a run goes on.
    """

    token: str
    folder: Path
    stop: threading.Event = field(default_factory=threading.Event)
    history: list[Comparison] = field(default_factory=list)
    shown: Comparison | None = None
    running: bool = False

    def begin(self) -> threading.Event:
        """The start of a run; what stops it.

        Raises:
            ValueError: while another one goes on.
        """
        if self.running:
            raise ValueError("a run of yours is going on; wait for it or cancel it.")
        self.running, self.stop = True, threading.Event()
        return self.stop

    def remember(self, comparison: Comparison) -> None:
        """Adds a comparison and drops the oldest one beyond ``REMEMBERED``."""
        self.history.append(comparison)
        del self.history[:-REMEMBERED]
        self.shown = comparison


class Sessions:
    """All visitors, by the name that Gradio gives a browser session.

    Args:
        folder: below which their files lie, and in ``cache`` the copies of what Gradio serves.
        most: how many are remembered; the one that came first goes for a new one. Default 64.
    """

    def __init__(self, folder: Path, most: int = MOST_SESSIONS) -> None:
        self._root, self.cache = folder / "sessions", folder / "cache"
        self.cache.mkdir(parents=True, exist_ok=True)
        self._most = most
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, name: str | None) -> Session:
        """The session of that name, made when it is new."""
        with self._lock:
            if str(name) not in self._sessions:
                while len(self._sessions) >= self._most:
                    self._leave(self._sessions.popitem(last=False)[1])
                token = secrets.token_hex(8)
                folder = self._root / token
                folder.mkdir(parents=True)
                self._sessions[str(name)] = Session(token, folder)
            return self._sessions[str(name)]

    def end(self, name: str | None) -> None:
        """Stops its run and removes its files, the copies that Gradio made included."""
        with self._lock:
            session = self._sessions.pop(str(name), None)
        if session is not None:
            self._leave(session)

    def end_all(self) -> None:
        """Stops every run and removes all files of sessions."""
        for name in [*self._sessions]:
            self.end(name)

    def done(self, session: Session) -> None:
        """The end of a run; what it wrote after its visitor had gone goes too."""
        session.running = False
        with self._lock:
            gone = session not in self._sessions.values()
        if gone:
            self._leave(session)

    def _leave(self, session: Session) -> None:
        session.stop.set()
        shutil.rmtree(session.folder, ignore_errors=True)
        for copy in self.cache.glob(f"*/{session.token}-*"):
            copy.unlink(missing_ok=True)
            if not any(copy.parent.iterdir()):
                copy.parent.rmdir()
