"""The page at `/`: its files, read once, under a policy that lets it load nothing else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_FILES = {
    "/": ("index.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/chat.js": ("chat.js", "text/javascript"),
    "/page/charts.js": ("charts.js", "text/javascript"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}


def pages_router() -> APIRouter:
    """A route a file."""
    router = APIRouter(include_in_schema=False)
    folder = resources.files(__package__) / "page"
    for path, (name, media_type) in _FILES.items():
        body = (folder / name).read_bytes()
        router.add_api_route(path, _file(body, media_type), response_class=Response)
    return router


def _file(body: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def file() -> Response:
        return Response(body, headers=_HEADERS, media_type=media_type)

    return file
