"""The demo's page in a process of its own, and a browser that looks at it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START = 60  # seconds after which a server that does not answer is a failure
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Args:
        url: of the page.
        temporary: folder in which it may write.
        process: its own.
        log: what it printed.
    """

    url: str
    temporary: Path
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def files(self) -> list[Path]:
        """All files in its temporary folder."""
        return [path for path in self.temporary.rglob("*") if path.is_file()]

    def end(self, how: signal.Signals) -> int:
        """Its exit status after a signal."""
        self.process.send_signal(how)
        return self.process.wait(timeout=60)


@contextmanager
def serving(folder: Path, **environment: str) -> Iterator[Server]:
    """A server below a folder until the block ends."""
    temporary = folder / "temporary"
    temporary.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dit_accel.cli", "demo", "--device", "cpu", "--port", str(port)]
    inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    threads = str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
    given = inherited | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": threads} | environment
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=given, stdout=log, stderr=subprocess.STDOUT)
    server = Server(f"http://127.0.0.1:{port}", temporary, process, folder / "log")
    try:
        _await(server)
        yield server
    finally:
        process.kill()
        process.wait()


def _await(server: Server) -> None:
    for _ in range(START * 5):
        if server.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(server.url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the demo did not start: {server.log.read_text()[-2000:]}")


@contextmanager
def browsing() -> Iterator[Any]:
    """Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """One browser context with the page open; whatever it complains about is kept.

    Args:
        browser: that it is a context of.
        server: whose page it opens.
        options: of the context, such as its viewport.
    """

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        self._context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page: Any = self._context.new_page()
        self.page.set_default_timeout(60_000)
        self.complaints: list[str] = []
        self.outside: list[str] = []
        own = (server.url, "data:", "blob:", "about:")
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda asked: None if asked.url.startswith(own) else self.outside.append(asked.url))
        self.page.goto(server.url)
        self.page.get_by_text("Settings of the right side").wait_for()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def fill(self, **fields: object) -> None:
        """Fields of the Compare tab by id; sizes are unfolded first."""
        if not self.page.locator("#height input").is_visible():
            self.page.get_by_role("button", name="Size, steps and seed").click()
        for name, value in fields.items():
            box = self.page.locator(f"#{name}").locator("input, textarea").first
            box.fill(str(value))
            box.blur()

    def choose(self, field: str, option: str) -> None:
        """One option of a list."""
        self.page.locator(f"#{field} input").click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def watch(self) -> None:
        """Begins to note every text that stands where the progress is, in ``seen``."""
        self.page.evaluate(
            """() => {
              window.seen = [];
              const note = () => {
                const text = document.querySelector('#progress').innerText.trim();
                if (text !== window.seen.at(-1)) window.seen.push(text);
              };
              new MutationObserver(note).observe(
                document.querySelector('#progress'), {childList: true, subtree: true, characterData: true});
            }"""
        )

    @property
    def seen(self) -> list[str]:
        found: list[str] = self.page.evaluate("window.seen")
        return found

    def compare(self, **fields: object) -> None:
        """Fills fields and starts."""
        self.fill(**fields)
        self.page.locator("#run").click()

    def await_progress(self, text: str | re.Pattern[str]) -> None:
        self.page.locator("#progress").get_by_text(text).first.wait_for()

    def await_rest(self) -> None:
        """Until the button says that nothing runs."""
        self.page.locator("#run").get_by_text("Compare", exact=True).wait_for()

    def close(self) -> None:
        self._context.close()
