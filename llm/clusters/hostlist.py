"""Names of hosts: each one once, and out of Slurm's short form."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_BRACKETS = re.compile(r"\[([^\]]*)\]")


def unique_hosts(names: Iterable[str]) -> tuple[str, ...]:
    """Each host once, in the order of the first mention; `n1` and `n1.cluster.org` are one host."""
    hosts: list[str] = []
    for name in dict.fromkeys(word.strip() for word in names):
        if name and not any(is_same_host(name, other) for other in hosts):
            hosts.append(name)
    return tuple(hosts)


def is_same_host(one: str, other: str) -> bool:
    """Whether two names are equal, or one is the other without its domain."""
    short, long = sorted((one.lower(), other.lower()), key=len)
    return short == long or long.startswith(f"{short}.")


def index_of(name: str, hosts: Sequence[str]) -> int | None:
    """Which of the hosts has this name, with another domain at most; None if none has, or several."""
    exact = [number for number, host in enumerate(hosts) if is_same_host(name, host)]
    # PBS may name a host by the domain of its fast network, which the host itself does not know.
    found = exact or [number for number, host in enumerate(hosts) if _label(host) == _label(name)]
    return found[0] if len(found) == 1 else None


def expand(text: str) -> tuple[str, ...]:
    """The hosts that Slurm's short form stands for: `n[01-03,7],x2` is n01, n02, n03, n7, x2.

    Raises:
        ValueError: the text is no such list.
    """
    return tuple(name for part in _split(text) for name in _expand_part(part))


def _expand_part(part: str) -> list[str]:
    found = _BRACKETS.search(part)
    if found is None:
        if not part or re.search(r"[\[\]\s]", part):
            raise ValueError(f"{part!r} is no list of hosts")
        return [part]
    before, after = part[: found.start()], part[found.end() :]
    return [name for number in _numbers(found[1]) for name in _expand_part(f"{before}{number}{after}")]


def _numbers(text: str) -> list[str]:
    """`01-03,7` as 01, 02, 03, 7."""
    numbers: list[str] = []
    for piece in text.split(","):
        first, dash, last = piece.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{text!r} is no list of numbers")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return numbers


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    return re.split(r",(?![^\[]*\])", text)


def _label(name: str) -> str:
    return name.lower() if re.fullmatch(r"[\d.]+|.*:.*", name) else name.lower().partition(".")[0]
