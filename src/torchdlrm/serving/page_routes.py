"""The page at `/`: static files of the package, as they are, for a browser.

In: the files of `page/`, read once.  Out: an `APIRouter` with `/` and one route for each other file under `/page/`.

The files need no key: they hold nothing secret, and the page has to be there to ask for one.  Everything else that
the page shows it fetches from the same server with `GET /schema` and `POST /predict`.
"""

import hashlib
from importlib.resources import files
from typing import Final

from fastapi import APIRouter, Request, Response

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


def page_router() -> APIRouter:
    """The routes of the page, to be mounted without a prefix and without a check of the API key.

    Each answers GET and HEAD, and 304 to a browser that has the file already.
    """
    router = APIRouter(include_in_schema=False)
    for name, content in page_files().items():
        _add(router, "/" if name == INDEX else f"/page/{name}", name, content)
    return router


def page_files() -> dict[str, bytes]:
    """The files of the page by name."""
    folder = files("torchdlrm.serving") / "page"
    return {
        entry.name: entry.read_bytes()
        for entry in folder.iterdir()
        if any(entry.name.endswith(suffix) for suffix in CONTENT_TYPES)
    }


def _add(router: APIRouter, path: str, name: str, content: bytes) -> None:
    suffix = name[name.rindex(".") :]
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # PlanRequest each time: after an upgrade of the server an old script must not meet a new page.
        "Cache-Control": "no-cache",
        "ETag": etag,
    }

    async def serve(request: Request) -> Response:
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=CONTENT_TYPES[suffix], headers=headers)

    router.add_api_route(path, serve, methods=["GET", "HEAD"], name=f"page {name}", response_model=None)
