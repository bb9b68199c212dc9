"""Hosts that meet at a store on the first of them, where each waits for the others no longer than it said."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from llm.config.errors import UserError

_POLL_SECONDS = 0.1
_ONE_TRY_SECONDS = 5.0


class Rendezvous:
    """A store of small values (whatever JSON has, but not None) that all hosts see.

    Attributes:
        address: of the first host.
        port: of the store.
    """

    def __init__(self, address: str, port: int, *, is_first: bool, seconds: float) -> None:
        """Opens the store on the first host, or waits for it.

        Args:
            address: name or address of the first host.
            port: where its store listens; 0 is any free one.
            is_first: whether to open it.
            seconds: how long to wait for it.

        Raises:
            UserError: nobody knows the name, the port is taken, or the first host does not answer.
        """
        if not is_first:
            _await_answer(address, port, seconds)
        try:
            self._store = open_store(address, port, is_first=is_first, seconds=seconds)
        except dist.DistError as error:
            if not is_first:
                raise UserError(f"{address}:{port} answers, but not as the first host's store: {error}") from error
            raise UserError(
                f"port {port} is taken on {address}: start the doctor once on each host, and end what uses the port"
            ) from error
        self.address, self.port = address, int(self._store.port)

    def say(self, key: str, value: object) -> None:
        """Puts a value where all find it.

        Raises:
            UserError: the first host is gone.
        """
        try:
            self._store.set(key, json.dumps(value))
        except dist.DistError as error:
            raise self._gone() from error

    def count(self, key: str) -> int:
        """Adds one to a counter; how often that happened before.

        Raises:
            UserError: the first host is gone.
        """
        try:
            return int(self._store.add(key, 1)) - 1
        except dist.DistError as error:
            raise self._gone() from error

    def heard(self, key: str) -> Any:
        """A value that is there already, or None.

        Raises:
            UserError: the first host is gone.
        """
        try:
            return json.loads(self._store.get(key)) if self._store.check([key]) else None
        except dist.DistError as error:
            raise self._gone() from error

    def await_all(self, keys: Iterable[str], seconds: float) -> list[str]:
        """Waits until all the keys are there; those that are not after this time.

        Raises:
            UserError: the first host is gone.
        """
        missing = list(keys)
        deadline = time.monotonic() + seconds
        while missing := [key for key in missing if self.heard(key) is None]:
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL_SECONDS)
        return missing

    def await_any(self, keys: Iterable[str], seconds: float) -> bool:
        """Waits until one of the keys is there; False when none is after this time.

        Raises:
            UserError: the first host is gone.
        """
        wanted = list(keys)
        deadline = time.monotonic() + seconds
        while all(self.heard(key) is None for key in wanted):
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def answer(self, key: str, seconds: float) -> str | None:
        """The text of a key as soon as the store has it, without the others' pauses; None when it comes too late."""
        try:
            self._store.wait([key], timedelta(seconds=seconds))
            return str(self._store.get(key).decode())
        except dist.DistError:
            return None

    def _gone(self) -> UserError:
        return UserError(f"{socket.gethostname()} lost the first host, {self.address}:{self.port}: see what it said")


def open_store(address: str, port: int, *, is_first: bool, seconds: float) -> TCPStore:
    """The store itself, for processes that need torch's own.

    Raises:
        dist.DistError: it cannot be opened, or reached within this time.
    """
    patience = timedelta(seconds=seconds)
    return TCPStore(address, port, None, is_master=is_first, timeout=patience, wait_for_workers=False)


def is_here(address: str) -> bool:
    """Whether a name or an address is one of this host's.

    Raises:
        UserError: nobody knows the name.
    """
    for family, kind, protocol, _, place in _places(address):
        with socket.socket(family, kind, protocol) as tried:
            try:
                tried.bind((place[0], 0, *place[2:]))
            except OSError:  # the address is another host's
                continue
            return True
    return False


def _places(address: str) -> list[Any]:
    try:
        return list(socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM))
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} knows no host {address} ({error}): the first host's name must be one that all know"
        ) from error


def _await_answer(address: str, port: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    problem: OSError | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((address, port), timeout=min(left, _ONE_TRY_SECONDS)):
                return
        except OSError as error:
            problem = error
            time.sleep(min(_POLL_SECONDS, left))
    raise UserError(
        f"{socket.gethostname()} waited {seconds:.0f} s for {address}:{port} ({problem}): start the doctor there too, "
        "and see whether a firewall or another network is between the two"
    ) from problem
