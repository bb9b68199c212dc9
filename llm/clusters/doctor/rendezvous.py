"""A store of small values on the first host, over which all hosts exchange facts; every wait has a limit."""

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
_CONNECT_SECONDS = 5.0


class Rendezvous:
    """A store of small values (anything that JSON can hold, except null) that all hosts share.

    Attributes:
        address: of the first host.
        port: of the store.
    """

    def __init__(self, address: str, port: int, *, is_first: bool, seconds: float) -> None:
        """Open the store on the first host, or connect to it.

        Args:
            address: name or address of the first host.
            port: where the store listens; 0 for any free one.
            is_first: whether this is the first host, which opens the store.
            seconds: how long to wait for the store.

        Raises:
            UserError: the name is unknown, the port is in use, or the first host does not answer.
        """
        if not is_first:
            _wait_for_listener(address, port, seconds)
        try:
            self._store = open_store(address, port, is_first=is_first, seconds=seconds)
        except dist.DistError as error:
            if not is_first:
                raise UserError(f"{address}:{port} answers, but not as the first host's store: {error}") from error
            raise UserError(
                f"port {port} is in use on {address}: start the doctor once on each host, and end what uses the port"
            ) from error
        self.address = address
        self.port = int(self._store.port)

    def set(self, key: str, value: object) -> None:
        """Store a value for all hosts.

        Raises:
            UserError: the store is lost.
        """
        try:
            self._store.set(key, json.dumps(value))
        except dist.DistError as error:
            raise self._lost() from error

    def get(self, key: str) -> Any:
        """Return a stored value without waiting; None if there is none.

        Raises:
            UserError: the store is lost.
        """
        try:
            return json.loads(self._store.get(key)) if self._store.check([key]) else None
        except dist.DistError as error:
            raise self._lost() from error

    def next_number(self, counter: str) -> int:
        """Return how often any host has called this with the same counter before: 0, 1, 2, ...

        Raises:
            UserError: the store is lost.
        """
        try:
            return int(self._store.add(counter, 1)) - 1
        except dist.DistError as error:
            raise self._lost() from error

    def wait_all(self, keys: Iterable[str], seconds: float) -> list[str]:
        """Wait until all keys have values, and return those that have none after this time.

        Raises:
            UserError: the store is lost.
        """
        missing = list(keys)
        deadline = time.monotonic() + seconds
        while missing := [key for key in missing if self.get(key) is None]:
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL_SECONDS)
        return missing

    def wait_any(self, keys: Iterable[str], seconds: float) -> bool:
        """Wait until one of the keys has a value, and return whether one has after this time.

        Raises:
            UserError: the store is lost.
        """
        candidates = list(keys)
        deadline = time.monotonic() + seconds
        while all(self.get(key) is None for key in candidates):
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def wait_text(self, key: str, seconds: float) -> str | None:
        """Wait for a value without polling, and return its JSON text; None if there is none after this time.

        It returns sooner than `wait_all` and `wait_any`, which poll every 0.1 s.
        """
        try:
            self._store.wait([key], timedelta(seconds=seconds))
            return str(self._store.get(key).decode())
        except dist.DistError:
            return None

    def _lost(self) -> UserError:
        return UserError(
            f"{socket.gethostname()} lost the first host, {self.address}:{self.port}: read the messages of that host"
        )


def open_store(address: str, port: int, *, is_first: bool, seconds: float) -> TCPStore:
    """Open torch's store of a rendezvous, or connect to it.

    Args:
        address: name or address of the first host.
        port: where the store listens.
        is_first: whether to open it.
        seconds: how long to wait for it.

    Raises:
        dist.DistError: the store cannot be opened, or not be reached within this time.
    """
    timeout = timedelta(seconds=seconds)
    return TCPStore(address, port, None, is_master=is_first, timeout=timeout, wait_for_workers=False)


def _wait_for_listener(address: str, port: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    problem: OSError | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((address, port), timeout=min(left, _CONNECT_SECONDS)):
                return
        except OSError as error:
            problem = error
            time.sleep(min(_POLL_SECONDS, left))
    raise UserError(
        f"{socket.gethostname()} waited {seconds:.0f} s for {address}:{port} ({problem}): start the doctor there too, "
        "and check that no firewall separates the two hosts and that both are on one network"
    ) from problem
