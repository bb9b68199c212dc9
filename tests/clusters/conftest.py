"""Hosts and schedulers for the tests of this folder; every pytest process starts its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clusters.hosts import Hosts
from tests.clusters.slurm_cluster import Cluster


@pytest.fixture(scope="session")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts, n1 and n2, without a scheduler."""
    hosts = Hosts(tmp_path_factory.mktemp("hosts"), ["n1", "n2"])
    yield hosts
    hosts.close()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm cluster of two hosts."""
    hosts = Hosts(tmp_path_factory.mktemp("slurm"), ["n1", "n2"])
    try:
        yield from _cluster(hosts, "slurm")
    finally:
        hosts.close()


@pytest.fixture(scope="session")
def pbs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An emulated PBS cluster of two hosts."""
    hosts = Hosts(tmp_path_factory.mktemp("pbs"), ["n1", "n2"])
    try:
        yield from _cluster(hosts, "pbs")
    finally:
        hosts.close()


def _cluster(hosts: Hosts, kind: str) -> Iterator[Cluster]:
    cluster = Cluster(hosts, kind)
    yield cluster
    cluster.close()
