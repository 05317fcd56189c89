"""Hosts that a download may be redirected to: no hub, whatever it sends, may reach this network's machines."""

import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import urlsplit

import httpx

_ALSO_OF = {"huggingface.co": ("hf.co",)}  # whose large files come from other names


class RedirectNotAllowed(Exception):
    """A redirect leads to a host that downloads may not reach; the text is for the log."""


class Redirects:
    """Checks each request of a download that begins at `endpoint`. Its own host and the `named` hosts, which the
    operator gave, may be anywhere; hosts below it must have public addresses. No other host is allowed, and from https
    none without."""

    def __init__(self, endpoint: str, named: Collection[str] = ()):
        host = urlsplit(endpoint).hostname or ""
        self._secure = endpoint.startswith("https:")
        self._trusted = {host, *named}
        self._families = (host, *_ALSO_OF.get(host, ()))

    def check(self, request: httpx.Request) -> None:
        """Raise `RedirectNotAllowed` unless the request's host may be reached; a hook of httpx."""
        host = request.url.host
        if self._secure and request.url.scheme != "https":
            raise RedirectNotAllowed(f"a redirect to {host} leaves https")
        if host in self._trusted:
            return
        if not any(host == family or host.endswith(f".{family}") for family in self._families):
            raise RedirectNotAllowed(
                f"a redirect to the host {host} is not allowed; --allow-source https://{host} allows it"
            )
        if not _is_public(host):
            raise RedirectNotAllowed(f"a redirect to {host} leads to a private address")


def _is_public(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return True  # the request fails as well
    return all(ipaddress.ip_address(str(place[4][0]).partition("%")[0]).is_global for place in found)
