"""GET /: a page to chat with the served model. One file, which loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

__all__ = ["Page"]

_FILE = Path(__file__).with_name("page.html")


class Page:
    def __init__(self) -> None:
        self._html = _FILE.read_text(encoding="utf-8")
        self._headers = {
            "Cache-Control": "no-cache",
            "Content-Security-Policy": _policy(self._html),
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    async def show(self, request: Request) -> Response:
        return HTMLResponse(self._html, headers=self._headers)


def _policy(html: str) -> str:
    """Only this page's own script and style run, and they reach only this server."""
    rules = {
        "default-src": "'none'",
        "script-src": _hash(html, "script"),
        "style-src": _hash(html, "style"),
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "media-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {sources}" for name, sources in rules.items())


def _hash(html: str, tag: str) -> str:
    """https://www.w3.org/TR/CSP3/#grammardef-hash-source of the only such element."""
    (content,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
