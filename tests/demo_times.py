"""How long the demo takes on this machine, no test: ``python tests/demo_times.py OUT.jsonl`` appends JSON lines."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from demo_server import CHROMIUM, serving
from playwright.sync_api import Page, sync_playwright

from dit_accel.eval.machine import machine, source_version, versions

EXAMPLES = ("Video: draft", "Image: neighborhood", "Video: reused steps")
QUERIES, DENSITIES = (0.2, 0.3, 0.4, 0.6), (0.2, 0.25, 0.3, 0.35)


def rows(page: Page) -> Iterator[dict[str, Any]]:
    """What was done and how many seconds it took."""
    for example in EXAMPLES:
        began = time.monotonic()
        page.get_by_role("button", name=example, exact=True).click()
        page.locator("#progress", has_text="step 1 of").wait_for()
        page.locator("#progress", has_text="Done").wait_for(timeout=300_000)
        result = page.locator("#progress").inner_text().strip()
        yield {"what": f"example {example}", "seconds": time.monotonic() - began, "result": result}
    page.get_by_role("tab", name="Patterns").click()
    page.locator("#pattern-picture img").wait_for()
    page.wait_for_timeout(8000)  # the machine is measured meanwhile
    numbers = page.locator("input[type=number]:visible")
    for what, box, values in (("query moved", numbers.nth(3), QUERIES), ("density set", numbers.nth(6), DENSITIES)):
        for value in values:
            began = time.monotonic()
            with page.expect_response(lambda response: "run/predict" in response.url) as answer:
                box.fill(str(value))
                box.press("Enter")
            answer.value.finished()
            yield {"what": f"pattern of 119,056 tokens, {what}", "seconds": time.monotonic() - began}
            page.wait_for_timeout(3000)


def main(output: Path) -> None:
    shared = {
        "command": "python tests/demo_times.py",
        "machine": machine(),
        "versions": versions(),
        "commit": source_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with tempfile.TemporaryDirectory() as folder, output.open("a") as file:
        began = time.monotonic()
        with serving(Path(folder)) as server, sync_playwright() as playwright:
            started = {"what": "page answers", "seconds": time.monotonic() - began}
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(server.url)
            for row in chain([started], rows(page)):
                line = row | {"seconds": round(row["seconds"], 3)}
                print(line, flush=True)
                file.write(json.dumps(line | shared) + "\n")
            browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
