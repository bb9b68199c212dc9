"""Several hosts on this machine, each with its own name, address and network, and a connection to the others.

They and all their processes live in namespaces of the kernel: this machine's network, `/etc/hosts` and processes stay
as they are, and when the first process of the namespaces ends, the kernel ends all others.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATH = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"

# $0 is the folder, the arguments are the names. One bridge, one cable per host. Ends with its standard input.
_BEGIN = """
set -e
mount --bind "$0/hosts" /etc/hosts
mount -t tmpfs none /run
ip link set lo up
ip link add cluster type bridge
ip link set cluster up
number=0
for name in "$@"; do
    number=$((number + 1))
    unshare --net --uts --mount sh -c 'hostname "$1"; echo $$ > "$0/$1.pid"; exec sleep infinity' "$0" "$name" &
    while [ ! -s "$0/$name.pid" ]; do sleep 0.01; done
    ip link add "c$number" type veth peer name eth0 netns "$(cat "$0/$name.pid")"
    ip link set "c$number" master cluster up
    nsenter --target "$(cat "$0/$name.pid")" --net sh -ec '
        ip link set lo up
        ip link set eth0 up
        ip address add "$0/24" dev eth0' "10.77.0.$number"
done
echo ready
while read -r _; do :; done
"""

# Does what sshd does with a command: a fresh environment, the home folder, and a shell that parses the words again.
_SSH = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1; shift
if [ "$(hostname)" = "$host" ]; then enter=; else
    enter="nsenter --target $(cat '{folder}'/"$host".pid) --mount --uts --net"; fi
exec $enter env -i HOME="$HOME" USER=root LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin sh -c 'cd && eval "$0"' "$*"
"""


# Debian's names of the two mpiexec; both use the stand-in for ssh.
_MPIEXEC = """#!/bin/sh
export HYDRA_LAUNCHER=ssh HYDRA_LAUNCHER_EXEC='{folder}/bin/ssh'
export OMPI_MCA_plm_rsh_agent='{folder}/bin/ssh' OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
exec {program} "$@"
"""
MPIS = {"mpich": "mpiexec.hydra", "openmpi": "mpiexec.openmpi"}


def require(*programs: str) -> None:
    """Skip the test if one of these programs is not installed."""
    missing = [program for program in programs if shutil.which(program, path=f"{PATH}:{os.environ['PATH']}") is None]
    if missing:
        give_up(f"no {' and no '.join(missing)} here")


def give_up(reason: str) -> None:
    """Skip the test, or fail it if LLM_TESTS_NEED_CLUSTERS is set."""
    if os.environ.get("LLM_TESTS_NEED_CLUSTERS"):
        pytest.fail(reason)
    pytest.skip(reason)


class Hosts:
    """Hosts that share the files of this machine.

    Attributes:
        names: such as n1, n2; the first is where users log in.
        folder: holds `bin/ssh`, which takes `HOST COMMAND…`, and the real `mpich/mpiexec` and `openmpi/mpiexec`,
            which use it.
        home: the home folder on all of them.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """Start the hosts; skip the test if the kernel forbids it.

        Args:
            folder: an empty one.
            names: up to 200.
        """
        require("unshare", "nsenter", "ip")
        self.folder = folder
        self.names = tuple(names)
        self.home = folder / "home"
        self.home.mkdir()
        (folder / "bin").mkdir()
        addresses = [f"10.77.0.{number} {name}" for number, name in enumerate(names, 1)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *addresses, ""]))
        write_program(folder / "bin" / "ssh", _SSH.format(folder=folder))
        for name, program in MPIS.items():
            (folder / name).mkdir()
            write_program(folder / name / "mpiexec", _MPIEXEC.format(folder=folder, program=program))
        enter = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        if os.geteuid() != 0:
            enter[1:1] = ["--user", "--map-root-user"]
        self._first = subprocess.Popen(
            [*enter, "bash", "-c", _BEGIN, str(folder), *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "hosts.log").open("wb"),
            text=True,
            env=self.environment(),
        )
        assert self._first.stdout is not None
        if self._first.stdout.readline() != "ready\n":
            self.close()
            pytest.skip(f"the kernel forbids hosts here: {(folder / 'hosts.log').read_text().strip()}")
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        self._pid = children.read_text().split()[0]

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a user who has logged in: this Python first on PATH, and this repository's package."""
        return {
            "HOME": str(self.home),
            "USER": "root",
            "LANG": "C.UTF-8",
            "PATH": f"{self.folder}/bin:{PATH}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **more,
        }

    def command(self, name: str, words: Sequence[str | Path], folder: Path | None = None) -> list[str]:
        """The command that runs `words` on a host, in this folder (by default its home)."""
        kinds = ["--mount", "--uts", "--net", "--pid"]
        if os.geteuid() != 0:
            kinds += ["--user", "--preserve-credentials"]
        host = (self.folder / f"{name}.pid").read_text().strip()
        return [
            *("nsenter", "--target", self._pid, *kinds, "--"),
            *("nsenter", "--target", host, "--mount", "--uts", "--net", "--"),
            *("sh", "-c", 'cd "$0" && exec "$@"', str(folder or self.home), *map(str, words)),
        ]

    def run(
        self,
        name: str,
        *words: str | Path,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end."""
        return subprocess.run(
            self.command(name, words, folder),
            env=dict(environment or self.environment()),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start(
        self,
        name: str,
        *words: str | Path,
        log: Path,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command on a host, with its output in a file."""
        with log.open("wb") as file:
            return subprocess.Popen(
                self.command(name, words, folder),
                env=dict(environment or self.environment()),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def close(self) -> None:
        """End the hosts and all their processes."""
        assert self._first.stdin is not None and self._first.stdout is not None
        self._first.stdin.close()
        try:
            self._first.wait(10)
        except subprocess.TimeoutExpired:
            self._first.kill()  # the kernel then ends its child, and that one's namespaces
            self._first.wait()
        self._first.stdout.close()


def write_program(path: Path, text: str) -> None:
    """Write an executable script."""
    path.write_text(text)
    path.chmod(0o755)


def clone(folder: Path) -> Path:
    """Make a folder like a clone of this repository, with its environment in `.venv`."""
    folder.mkdir()
    for name in ("llm", "jobs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def wait_until(condition: Callable[[], object], what: str, seconds: float, log: Path | None = None) -> None:
    """Return when `condition()` is true; fail the test if it is not within this time."""
    deadline = time.monotonic() + seconds
    while not condition():
        output = log.read_text(errors="replace")[-3000:] if log is not None and log.exists() else ""
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s\n{output}"
        time.sleep(0.1)
