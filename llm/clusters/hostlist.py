"""Names of hosts: compare them, expand Slurm's host lists, and recognise this host."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Sequence

_BRACKETS = re.compile(r"\[([^\]]*)\]")


def unique_hosts(names: Iterable[str]) -> tuple[str, ...]:
    """Return each host once, in the order of its first mention; `n1` and `n1.cluster.org` are one host."""
    hosts: list[str] = []
    for name in dict.fromkeys(word.strip() for word in names):
        if name and not any(is_same_host(name, other) for other in hosts):
            hosts.append(name)
    return tuple(hosts)


def is_same_host(one: str, other: str) -> bool:
    """Return whether two names are equal, or differ only in that one lacks the domain."""
    short, long = sorted((one.lower(), other.lower()), key=len)
    return short == long or long.startswith(f"{short}.")


def host_index(name: str, hosts: Sequence[str]) -> int | None:
    """Return the index of the host with this name.

    A host whose name differs in the domain matches if no name matches better.

    Returns:
        The index; None if no host or several hosts match.
    """
    matches = [index for index, host in enumerate(hosts) if is_same_host(name, host)]
    if not matches:
        # PBS may name a host by the domain of its fast network, which the host itself does not know.
        matches = [index for index, host in enumerate(hosts) if _first_label(host) == _first_label(name)]
    return matches[0] if len(matches) == 1 else None


def is_local_host(host: str) -> bool:
    """Return whether a name or an address belongs to this host.

    A host is local if the name is this host's, up to the domain, or if a socket can be bound to one of its addresses.

    Raises:
        OSError: the name cannot be resolved.
    """
    if host_index(socket.gethostname(), [host]) is not None:
        return True
    for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
        except OSError:  # the address is another host's
            continue
        return True
    return False


def expand_hostlist(text: str) -> tuple[str, ...]:
    """Return the hosts of Slurm's compressed host list: `n[01-03,7],x2` is n01, n02, n03, n7, x2.

    Raises:
        ValueError: the text is not a host list.
    """
    return tuple(name for part in _split(text) for name in _expand_part(part))


def _expand_part(part: str) -> list[str]:
    brackets = _BRACKETS.search(part)
    if brackets is None:
        if not part or re.search(r"[\[\]\s]", part):
            raise ValueError(f"{part!r} is no list of hosts")
        return [part]
    before = part[: brackets.start()]
    after = part[brackets.end() :]
    return [name for number in _numbers(brackets[1]) for name in _expand_part(f"{before}{number}{after}")]


def _numbers(text: str) -> list[str]:
    """Expand `01-03,7` to 01, 02, 03, 7."""
    numbers: list[str] = []
    for piece in text.split(","):
        first, dash, last = piece.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{text!r} is no list of numbers")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return numbers


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    return re.split(r",(?![^\[]*\])", text)


def _first_label(name: str) -> str:
    """The name without its domain, in lower case; an address is returned whole."""
    return name.lower() if re.fullmatch(r"[\d.]+|.*:.*", name) else name.lower().partition(".")[0]
