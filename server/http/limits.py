"""How many connections the server takes, in all and from one address."""

import ipaddress
import resource
from collections import Counter

_MOST_DESCRIPTORS = 1 << 16  # more cost time wherever descriptors are walked, and no server here needs them
_MOST_CONNECTIONS = 1 << 14
_RESERVED = 256  # descriptors for files, the engine and child processes


def raise_descriptor_limit() -> int:
    """Raise this process's limit of open files as far as it may, and return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return min(soft, _MOST_DESCRIPTORS) if soft != resource.RLIM_INFINITY else _MOST_DESCRIPTORS
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def most_connections(descriptors: int) -> int:
    """Return the number of connections that leaves descriptors for everything else."""
    return min(descriptors - min(_RESERVED, descriptors // 2), _MOST_CONNECTIONS)


class ConnectionLimits:
    """Counts open connections. One address may hold half of `most`: behind a proxy all requests have one address, and
    a single client must not take every place."""

    def __init__(self, most: int):
        self._most = most
        self._of_one = max(1, most // 2)
        self._open: Counter[str] = Counter()

    def enter(self, host: str) -> bool:
        """Count a connection from `host`; returns False, without counting, if there is no place for it."""
        network = _network(host)
        if self._open.total() >= self._most or self._open[network] >= self._of_one:
            return False
        self._open[network] += 1
        return True

    def leave(self, host: str) -> None:
        network = _network(host)
        self._open[network] -= 1
        if not self._open[network]:
            del self._open[network]


def _network(host: str) -> str:
    """Return what counts as one address: of IPv6 the first 64 bits, because one client may have all the others."""
    if ":" not in host:
        return host
    return str(ipaddress.IPv6Network((host.partition("%")[0], 64), strict=False))
