"""The page's files over real HTTP: what a browser gets, and what it may do with it."""

import re

import httpx
import pytest

from torchdlrm.serving.page.routes import page_files


@pytest.fixture(scope="module")
def client(page_server):
    with httpx.Client(base_url=page_server) as client:
        yield client


def test_the_page_and_every_file_that_it_names_are_there_with_their_types(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.content == page_files()["index.html"]
    named = re.findall(r'(?:src|href)="(/page/[^"]+)"', page.text)
    for script in [path for path in named if path.endswith(".js")]:
        named += re.findall(r'from "(/[^"]+)"', client.get(script).text)
    assert {path.removeprefix("/page/") for path in named} <= set(page_files())
    types = {path: client.get(path).headers["content-type"] for path in named}
    assert {kind for path, kind in types.items() if path.endswith(".js")} == {"text/javascript; charset=utf-8"}
    assert types["/page/style.css"] == "text/css; charset=utf-8"


def test_no_file_is_left_out_by_its_type_and_none_is_served_that_is_not_there(client):
    assert all(client.get(f"/page/{name}").status_code == 200 for name in page_files() if name != "index.html")
    for path in ("/page/nothing.js", "/page/../app.py", "/page/%2e%2e/routes.py", "/page/"):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize("path", ["/", "/page/app.js"])
def test_a_browser_may_load_nothing_from_elsewhere(client, path):
    headers = client.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[key] for key in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"


def test_files_name_no_other_host():
    # The namespace of SVG is a name, not an address that anything is fetched from.
    text = b"\n".join(page_files().values()).replace(b"http://www.w3.org/2000/svg", b"")
    assert re.findall(rb"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text) == []
    assert b"style=" not in page_files()["index.html"]
    assert b"<script>" not in page_files()["index.html"]


def test_a_file_that_the_browser_has_is_not_sent_again(client):
    first = client.get("/page/style.css")
    again = client.get("/page/style.css", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = client.head("/page/style.css")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(first.content))
