"""Serves the page at `/`: static files of the package, unchanged.

In: the files of `files/`, read once.  Out: a route for `/` and one for each other file under `/page/`.

The files need no key: they hold nothing secret, and the page has to be there to ask for one.  Everything else that
the page shows it fetches from the same server with `GET /schema`, `POST /predict` and `POST /explain`.
"""

import hashlib
from importlib.resources import files
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

CONTENT_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from anywhere else, no script or style inside the page: a value that looks like markup cannot run.
CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
INDEX: Final = "index.html"


def page_routes() -> list[Route]:
    """Make the routes of the page, which need no API key.

    Each answers GET and HEAD, and 304 to a browser that has the file already.
    """
    return [_route("/" if name == INDEX else f"/page/{name}", name, content) for name, content in page_files().items()]


def page_files() -> dict[str, bytes]:
    """Read the files of the page by name."""
    folder = files("torchdlrm.serving.page") / "files"
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.name.endswith((*CONTENT_TYPES,))}


def _route(path: str, name: str, content: bytes) -> Route:
    suffix = name[name.rindex(".") :]
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # Ask each time: after an upgrade of the server an old script must not meet a new page.
        "Cache-Control": "no-cache",
        "ETag": etag,
    }

    async def serve(request: Request) -> Response:
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=CONTENT_TYPES[suffix], headers=headers)

    return Route(path, serve, methods=["GET"], name=f"page {name}")
