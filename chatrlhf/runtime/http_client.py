"""HTTP client for endpoints that a configuration names: what they answer is bounded, no redirect leads elsewhere."""

from __future__ import annotations

import base64
import http.client
import time
import urllib.error
import urllib.request
from urllib.parse import SplitResult, unquote, urljoin, urlsplit, urlunsplit

CHUNK = 64 * 1024  # bytes
MOST_REDIRECTS = 5
USUAL_PORTS = {"http": 80, "https": 443}
AS_IT_WAS = (307, 308)  # these repeat a request as it was; the others would turn a POST into a GET without a body


class ReplyError(OSError):
    """An endpoint has answered in a way that is not accepted."""


def fetch(url: str, most_bytes: int, seconds: float, data: bytes | None = None) -> bytes:
    """The body of an answer to a GET, or of ``data`` to a POST of JSON.

    A redirect is followed where it stays on host, port and scheme, and repeats the request. User and password in the
    URL become a header of basic authentication.

    Args:
        most_bytes: of the answer's body.
        seconds: between two bytes, and for the whole body.

    Raises:
        OSError, http.client.HTTPException, ValueError: no connection, an error status, a redirect elsewhere, an answer
            that is too long or too slow, no address.
    """
    headers = {"Accept-Encoding": "identity", **({"Content-Type": "application/json"} if data is not None else {})}
    target, headers = _without_user(url, headers)
    deadline = time.monotonic() + seconds
    for _ in range(MOST_REDIRECTS + 1):
        request = urllib.request.Request(target, data=data, headers=headers)
        try:
            with _opener().open(request, timeout=seconds) as response:
                return _read(response, most_bytes, deadline, seconds)
        except urllib.error.HTTPError as error:
            with error:
                if not 300 <= error.code < 400:
                    raise
                target = _followed(target, error)
    raise ReplyError(f"it redirects more than {MOST_REDIRECTS} times")


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS alone, by the proxies of the environment: no files, no FTP, and no redirect is followed."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _without_user(url: str, headers: dict[str, str]) -> tuple[str, dict[str, str]]:
    """An address without user and password, and the headers that say them."""
    parts = urlsplit(url)
    user_info, at, place = parts.netloc.rpartition("@")
    if not at:
        return url, headers
    user, _, password = user_info.partition(":")
    secret = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
    target = urlunsplit((parts.scheme, place, parts.path, parts.query, parts.fragment))
    return target, headers | {"Authorization": f"Basic {secret}"}


def _followed(url: str, error: urllib.error.HTTPError) -> str:
    """Where a redirect leads. Raises ReplyError where that is another place, or the request would not be the same."""
    target = urljoin(url, error.headers.get("Location", ""))
    if _origin(urlsplit(target)) != _origin(urlsplit(url)):
        raise ReplyError(
            f"it redirects ({error.code}) to another place, {target}; name that in its place if you trust it"
        )
    if error.code not in AS_IT_WAS:
        raise ReplyError(f"it redirects ({error.code}) to {target} without what was asked; name that in its place")
    return target


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or USUAL_PORTS.get(parts.scheme)


def _read(response: http.client.HTTPResponse, most_bytes: int, deadline: float, seconds: float) -> bytes:
    body = bytearray()
    while chunk := response.read1(CHUNK):
        body += chunk
        if len(body) > most_bytes:
            raise ReplyError(f"its answer is longer than {most_bytes:,} bytes")
        if time.monotonic() > deadline:
            raise ReplyError(f"its answer was not complete after {seconds:g} seconds")
    return bytes(body)
