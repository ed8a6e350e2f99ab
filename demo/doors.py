"""What the server answers: the page's own events and files, nothing that brings files in or reaches another machine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

POSTS = ("queue/join", "run/predict", "cancel", "reset")  # all that the page sends
CLOSED = ("proxy=", "deep_link", "custom_component")  # other machines, saved states, code of components
FILES = "file="  # followed by a path; Gradio would fetch an address
_API = "/gradio_api/"

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


def shut() -> list[Middleware]:
    """Middleware that answers 403 to everything else below Gradio's API."""
    return [Middleware(_Doors)]


class _Doors:
    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not _open(scope["method"], scope["path"]):
            refusal = PlainTextResponse("This page takes no files and passes nothing on.", status_code=403)
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _open(method: str, path: str) -> bool:
    route = path.partition(_API)[2].strip("/")
    if method in ("GET", "HEAD", "OPTIONS"):
        return not route.startswith(CLOSED) and not (route.startswith(FILES) and "://" in unquote(route))
    return method == "POST" and route in POSTS
