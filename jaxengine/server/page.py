"""The chat page at `/`: one file, which asks nothing of any other server."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

router = APIRouter()
_HTML = (files("jaxengine.server") / "page.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    """Returns what the policy calls the page's own scripts or styles."""
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", _HTML, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


# Whatever a model writes, nothing but the page's own script runs, and it talks to this server only.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_hashes('script')}",
        f"style-src {_hashes('style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """Returns the page."""
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(_HTML, headers=headers)
