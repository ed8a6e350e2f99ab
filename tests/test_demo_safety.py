"""What a visitor of the demo cannot do, tried on a running server; what it leaves behind, which is nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dit_accel.demo.workshop import Limits, Wanted, Workshop
from dit_accel.methods import make_method

HELPER = Path(__file__).with_name("demo_server.py")
SPEC = importlib.util.spec_from_file_location("demo_server", HELPER)
assert SPEC is not None and SPEC.loader is not None
demo_server = importlib.util.module_from_spec(SPEC)
sys.modules["demo_server"] = demo_server
SPEC.loader.exec_module(demo_server)

pytestmark = pytest.mark.xdist_group("demo safety")  # servers start one after another
needs_browser = pytest.mark.skipif(
    demo_server.CHROMIUM is None, reason="needs a Chromium: chromium, chromium-browser, google-chrome"
)
TINY = {"height": 96, "width": 128, "frames": 9, "steps": 2}


class Recorder(BaseHTTPRequestHandler):
    """A proxy that refuses, and notes what it was asked for."""

    asked: list[str] = []  # noqa: RUF012 - of the one recorder there is

    def _refuse(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        self.send_error(502)

    do_GET = do_POST = do_HEAD = do_CONNECT = _refuse

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def proxy() -> Iterator[str]:
    recorder = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=recorder.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{recorder.server_port}"
    recorder.shutdown()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, proxy: str) -> Iterator[Any]:
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    environment = dict.fromkeys((*names, *map(str.lower, names)), proxy) | {"NO_PROXY": "127.0.0.1,localhost"}
    with demo_server.serving(tmp_path_factory.mktemp("demo"), **environment) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with demo_server.browsing() as running:
        yield running


def answer(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and body."""
    request = urllib.request.Request(url, data, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def upload(url: str, text: bytes) -> tuple[int, bytes]:
    edge = uuid.uuid4().hex
    head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n'.encode()
    return answer(
        url, head + text + f"\r\n--{edge}--\r\n".encode(), Content_Type=f"multipart/form-data; boundary={edge}"
    )


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "{folder}/secret.txt",
        "{temporary}/secret.txt",
        "{cache}/../../../secret.txt",
        "{cache}/..%2f..%2f..%2fsecret.txt",
        "{cache}/%2e%2e/%2e%2e/secret.txt",
        "../secret.txt",
        "secret.txt",
        "file:///etc/passwd",
    ],
)
def test_no_file_outside_its_folder_is_served(server: Any, path: str) -> None:
    folder = server.temporary.parent
    for place in (folder, server.temporary):
        (place / "secret.txt").write_text("secret")
    cache = next(server.temporary.glob("dit-accel-demo-*")) / "cache"
    asked = path.format(folder=folder, temporary=server.temporary, cache=cache)
    for route in ("file=", "file/"):
        status, body = answer(f"{server.url}/gradio_api/{route}{asked}")
        assert status >= 400 or not body.strip() or status in (301, 302, 307)
        assert b"secret" not in body.replace(b"secret.txt", b"") and b"root:" not in body


@pytest.mark.parametrize(
    "route", ["upload", "upload/", "upload?upload_id=a", "process_recording", "stream/a", "vibe-edit", "run/knobs"]
)
def test_no_file_is_taken(server: Any, route: str) -> None:
    before = {*server.files}
    assert upload(f"{server.url}/gradio_api/{route}", b"x" * 100_000)[0] == 403
    assert {*server.files} == before


@pytest.mark.parametrize(
    "route",
    [
        "proxy=http://127.0.0.1:9/",
        "file=http://127.0.0.1:9/",
        "file=https%3A%2F%2Fexample.com/a",
        "deep_link?session_hash=a",
        "custom_component/a/b/c/d",
    ],
)
def test_nothing_is_passed_on(server: Any, route: str) -> None:
    assert answer(f"{server.url}/gradio_api/{route}")[0] == 403


def test_no_event_has_a_public_name(server: Any) -> None:
    status, body = answer(f"{server.url}/gradio_api/info")
    assert status == 200
    assert json.loads(body) == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_a_model_that_is_not_offered_is_refused_whoever_asks(server: Any) -> None:
    """Past the page, by the events' numbers."""
    config = json.loads(answer(f"{server.url}/config")[1])
    numbers = [event["id"] for event in config["dependencies"] if event["inputs"]]
    for number in numbers:
        inputs = next(event["inputs"] for event in config["dependencies"] if event["id"] == number)
        kinds = {component["id"]: component for component in config["components"]}
        labels = [kinds[each]["props"].get("label") for each in inputs]
        if "Model" not in labels:
            continue
        data = [
            "/etc" if label == "Model" else kinds[each]["props"].get("value")
            for label, each in zip(labels, inputs, strict=True)
        ]
        body = json.dumps({"data": data, "fn_index": number, "session_hash": "intruder"}).encode()
        status, said = answer(f"{server.url}/gradio_api/run/predict", body, Content_Type="application/json")
        assert status >= 400, said


@needs_browser
@pytest.mark.parametrize(
    ("component", "value", "refusal"),
    [("model", "/etc", "/etc"), ("prompt", "a" * 5_000, "600 characters")],
    ids=["model", "prompt"],
)
def test_the_page_s_own_checks_are_made_again(
    server: Any, browser: Any, component: str, value: str, refusal: str
) -> None:
    """A request that the page would not send is refused by the server."""
    visitor = demo_server.Visitor(browser, server)
    place = ("model", "prompt").index(component)

    def forge(route: Any) -> None:
        sent = route.request.post_data_json
        if len(sent["data"]) > 10:
            sent["data"][place] = value
        route.continue_(post_data=json.dumps(sent))

    visitor.page.route("**/queue/join*", forge)
    visitor.compare(**TINY)
    toast = visitor.page.get_by_test_id("toast-body")
    toast.wait_for()
    assert refusal in toast.inner_text()
    visitor.await_rest()
    visitor.close()


@needs_browser
def test_what_a_visitor_made_goes_with_the_visitor(server: Any, browser: Any) -> None:
    before = {*server.files}
    visitor = demo_server.Visitor(browser, server)
    visitor.compare(**TINY)
    visitor.await_progress("Done:")
    visitor.page.locator("#slider img").first.wait_for()
    assert {*server.files} - before
    visitor.close()
    until = time.monotonic() + 60
    while {*server.files} - before and time.monotonic() < until:
        time.sleep(0.2)
    assert {*server.files} <= before


@needs_browser
def test_the_server_asked_no_other_machine(server: Any, browser: Any) -> None:
    visitor = demo_server.Visitor(browser, server)
    visitor.compare(**TINY)
    visitor.await_progress("Done:")
    visitor.close()
    assert Recorder.asked == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=lambda how: how.name)
def test_nothing_is_left_when_the_server_ends(tmp_path: Path, how: signal.Signals) -> None:
    with demo_server.serving(tmp_path) as running:
        assert list(running.temporary.glob("dit-accel-demo-*"))
        assert running.end(how) == 0
        assert not running.files and not list(running.temporary.glob("dit-accel-demo-*"))


@needs_browser
def test_nothing_is_left_when_the_server_ends_during_a_run(tmp_path: Path, browser: Any) -> None:
    with demo_server.serving(tmp_path) as running:
        visitor = demo_server.Visitor(browser, running)
        visitor.compare(**TINY | {"steps": 100})
        visitor.await_progress(re.compile(r"step \d+ of 100"))
        assert running.end(signal.SIGTERM) == 0
        assert not running.files and not list(running.temporary.glob("dit-accel-demo-*"))
        visitor.close()


def marking(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()\nclass Mine: pass\n"


@pytest.mark.parametrize("where", ["pipeline", "component", "text encoder"])
def test_code_in_a_model_folder_is_not_run(tmp_path: Path, where: str) -> None:
    marker, folder = tmp_path / "marker", tmp_path / "model"
    folder.mkdir()
    index: dict[str, object] = {"_class_name": "WanPipeline", "_diffusers_version": "0.42.0"}
    if where == "pipeline":
        index["_class_name"] = ["mine", "Mine"]
        (folder / "mine.py").write_text(marking(marker))
    elif where == "component":
        index["transformer"] = ["mine", "Mine"]
        (folder / "transformer").mkdir()
        (folder / "transformer" / "mine.py").write_text(marking(marker))
        (folder / "transformer" / "config.json").write_text("{}")
    else:
        index["text_encoder"] = ["transformers", "AutoModel"]
        (folder / "text_encoder").mkdir()
        (folder / "text_encoder" / "mine.py").write_text(marking(marker))
        config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"}}
        (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(index))
    workshop = Workshop([str(folder)], "cpu", Limits())
    dense = make_method("dense")
    wanted = Wanted(model=str(folder), prompt="anything", seed=0, methods=(dense, dense))
    with pytest.raises(ValueError, match="could not be loaded"):
        list(workshop.compare(wanted, threading.Event()))
    assert not marker.exists()
