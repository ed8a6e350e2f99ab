"""The demo's page in headless Chromium, on a server of its own."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HELPER = Path(__file__).with_name("demo_server.py")
SPEC = importlib.util.spec_from_file_location("demo_server", HELPER)
assert SPEC is not None and SPEC.loader is not None
demo_server = importlib.util.module_from_spec(SPEC)
sys.modules["demo_server"] = demo_server
SPEC.loader.exec_module(demo_server)

pytestmark = [
    pytest.mark.xdist_group("demo browser"),  # one server, and a browser that has a core to itself
    pytest.mark.skipif(
        demo_server.CHROMIUM is None, reason="needs a Chromium: chromium, chromium-browser, google-chrome"
    ),
]

TINY = {"height": 96, "width": 128, "frames": 9, "steps": 2}
PROMPTS = ("a red circle moving left over navy stripes", "a yellow triangle moving up over teal checks")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with demo_server.serving(tmp_path_factory.mktemp("demo")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with demo_server.browsing() as running:
        yield running


@pytest.fixture
def visit(browser: Any, server: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end nobody has seen an error or asked another machine."""
    visitors: list[Any] = []

    def open_page(**options: Any) -> Any:
        visitors.append(demo_server.Visitor(browser, server, **options))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.close()
        assert visitor.complaints == []
        assert visitor.outside == []


def test_every_tab_opens(visit: Callable[..., Any]) -> None:
    visitor = visit()
    for name, shown in (
        ("Patterns", "#pattern-method"),
        ("Results", "#results-page"),
        ("Tune", "#tune-run"),
        ("Compare", "#run"),
    ):
        visitor.tab(name)
        visitor.page.locator(shown).wait_for()


def test_a_comparison_shows_clips_figures_and_slider(visit: Callable[..., Any]) -> None:
    visitor = visit()
    visitor.watch()
    visitor.compare(prompt=PROMPTS[0], **TINY)
    visitor.await_progress("Done:")
    page = visitor.page
    assert page.locator("#clips video").count() == 3  # left, right and their difference
    page.wait_for_function("[...document.querySelectorAll('#clips video')].every(clip => clip.readyState >= 2)")
    cards = page.locator("#figures").inner_text()
    assert all(name in cards for name in ("Speed-up", "PSNR", "SSIM", "Pairs computed", "Prompt shown"))
    assert re.search(r"\d+\.\d\d×.*\d+\.\d dB", cards, re.DOTALL)
    assert page.locator("#slider img").count() == 2
    steps = [text for text in visitor.seen if "step" in text]
    assert [text.split()[0] for text in steps] == sorted(text.split()[0] for text in steps)  # left, then right
    assert {"left: dense: step 1 of 2", "right: draft: step 1 of 2"} <= {*steps}
    visitor.await_rest()


def test_another_frame_of_both_sides_can_be_chosen(visit: Callable[..., Any]) -> None:
    visitor = visit()
    visitor.compare(prompt=PROMPTS[0], **TINY)
    visitor.await_progress("Done:")
    page = visitor.page
    before = page.locator("#slider img").first.get_attribute("src")
    page.locator("#frame input[type=range]").press("ArrowRight")
    page.wait_for_function("before => document.querySelector('#slider img').getAttribute('src') !== before", arg=before)
    page.wait_for_function("[...document.querySelectorAll('#slider img')].every(image => image.naturalWidth === 128)")


def test_the_method_brings_its_knobs(visit: Callable[..., Any]) -> None:
    visitor = visit()
    page = visitor.page
    page.get_by_role("button", name="Settings of the right side: draft").click()
    page.get_by_label("Region", exact=False).first.wait_for()
    visitor.choose("right-method", "grat")
    page.get_by_role("button", name="Settings of the right side: grat").click()
    page.get_by_label("Pattern", exact=False).first.wait_for()
    assert page.get_by_label("Region", exact=False).count() == 0


def test_cancel_stops_within_one_step(visit: Callable[..., Any]) -> None:
    visitor = visit()
    visitor.watch()
    visitor.compare(prompt=PROMPTS[0], height=144, width=192, frames=9, steps=90)
    visitor.await_progress(re.compile(r"step \d+ of 90"))
    visitor.page.locator("#cancel").click()
    visitor.await_progress("Stopped.")
    seen = visitor.seen
    after = seen[seen.index("Stopping at the next step.") + 1 :]
    assert (
        len(after) <= 2 and after[-1] == "Stopped. Nothing was kept of this run."
    )  # at most the step that was going on
    assert not visitor.page.locator("#figures").is_visible()


def test_two_visitors_wait_for_each_other_and_do_not_mix(visit: Callable[..., Any]) -> None:
    first, second = visit(), visit()
    first.compare(prompt=PROMPTS[0], **TINY | {"steps": 100})
    first.await_progress(re.compile(r"step \d+ of 100"))
    second.compare(prompt=PROMPTS[1], **TINY)
    second.await_progress("waiting, 1 run before this one")
    first.page.locator("#cancel").click()
    first.await_progress("Stopped.")
    second.await_progress("Done:")
    assert PROMPTS[1] in second.page.locator("#progress").inner_text()
    assert not first.page.locator("#figures").is_visible()
    first.compare(**TINY)
    first.await_progress("Done:")
    assert PROMPTS[0] in first.page.locator("#progress").inner_text()
    assert PROMPTS[1] in second.page.locator("#progress").inner_text()


@pytest.mark.parametrize(
    ("size", "remedy"),
    [({"height": 100}, "multiples of"), ({"width": 4096}, "choose one in between"), ({"frames": 8}, "use")],
    ids=["height", "width", "frames"],
)
def test_a_bad_size_is_said_with_its_remedy(visit: Callable[..., Any], size: dict[str, int], remedy: str) -> None:
    visitor = visit()
    visitor.compare(prompt=PROMPTS[0], **TINY | size)
    toast = visitor.page.get_by_test_id("toast-body")
    toast.wait_for()
    assert remedy in toast.inner_text() and str(*size.values()) in toast.inner_text()
    visitor.await_rest()


def test_an_earlier_comparison_comes_back(visit: Callable[..., Any]) -> None:
    visitor = visit()
    for prompt in PROMPTS:
        visitor.compare(prompt=prompt, **TINY)
        visitor.page.locator("#progress").get_by_text(re.compile(f"Done:.*{prompt}")).wait_for()
    figures = visitor.page.locator("#figures").inner_text()
    visitor.page.locator("#history input").click()
    visitor.page.get_by_role("option").filter(has_text=PROMPTS[0]).click()
    visitor.page.locator("#progress").get_by_text(re.compile(f"Done:.*{PROMPTS[0]}")).wait_for()
    assert visitor.page.locator("#figures").inner_text() != figures


def test_the_keyboard_reaches_everything(visit: Callable[..., Any]) -> None:
    page = visit().page
    wanted, reached = ["Compare", "prompt", "left-method", "right-method", "run", "cancel"], []
    for _ in range(40):
        page.keyboard.press("Tab")
        here = page.evaluate(
            """() => {
              const at = document.activeElement;
              if (at.role === 'tab') return at.innerText;
              return at.closest('#prompt, #left-method, #right-method, #run, #cancel')?.id;
            }"""
        )
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        if here in ("run", "cancel"):
            assert outline == "solid"
        if here in wanted and here not in reached:
            reached.append(here)
    assert reached == wanted


@pytest.mark.parametrize("tab", ["Compare", "Patterns", "Results", "Tune"])
def test_a_phone_scrolls_in_one_direction(visit: Callable[..., Any], tab: str) -> None:
    visitor = visit(viewport={"width": 390, "height": 844})
    visitor.tab(tab)
    if tab == "Compare":
        visitor.compare(prompt=PROMPTS[0], **TINY)
        visitor.await_progress("Done:")
        visitor.page.locator("#slider").wait_for()
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_pattern_follows_the_sliders(
    visit: Callable[..., Any], record_property: Callable[[str, object], None]
) -> None:
    visitor = visit()
    visitor.tab("Patterns")
    picture = visitor.page.locator("#pattern-picture img")
    picture.wait_for()
    assert "119,056" in visitor.page.locator("#pattern-figures").inner_text()
    before = picture.get_attribute("src")
    slider = visitor.page.locator("#pattern-query-row input[type=range]")
    with visitor.page.expect_request_finished(lambda request: "run/predict" in request.url) as answer:
        slider.press("End")
    visitor.page.wait_for_function(
        "before => document.querySelector('#pattern-picture img').getAttribute('src') !== before", arg=before
    )
    milliseconds = answer.value.timing["responseEnd"]
    record_property("pattern_of_119056_tokens_ms", milliseconds)
    print(f"the pattern of 119,056 tokens was answered in {milliseconds:.0f} ms")
