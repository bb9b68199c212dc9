"""A Slurm, or an emulated PBS, on hosts of the tests: Debian's own daemons, without systemd and cgroups.

The PBS is Slurm with Debian's `qsub`, `qstat` and `qdel`, corrected where they differ from a real PBS: jobs get PBS's
variables and none of Slurm's, start in the home folder in a fresh environment, and have 10 s after SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from pathlib import Path

from tests.clusters.hosts import Hosts, give_up, require, wait_until, write_program

_START_SECONDS = 30.0
_ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")

_CONF = """
ClusterName=tests
SlurmctldHost={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
KillWait={kill_seconds}
InactiveLimit=0
MinJobAge=3600
{prolog}
NodeName={names} CPUs=64 State=UNKNOWN
PartitionName=debug Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""

# Slurm runs it before a job's script; its output sets the script's environment.
_PBS_PROLOG = """#!/bin/bash
nodes={folder}/nodefile.$SLURM_JOB_ID
scontrol show hostnames "$SLURM_JOB_NODELIST" |
    while read -r host; do for _ in $(seq "${{SLURM_NTASKS_PER_NODE:-1}}"); do echo "$host"; done; done > "$nodes"
echo "export PBS_NODEFILE=$nodes"
echo "export PBS_JOBID=$SLURM_JOB_ID.{first}"
echo "export PBS_O_WORKDIR=$SLURM_SUBMIT_DIR"
echo "export PBS_ENVIRONMENT=PBS_BATCH"
compgen -e | grep -E '^SLURM' | grep -v '^SLURM_CONF$' | sed 's/^/unset /'
"""

# A job's identifier is NUMBER.SERVER; a job starts in the home folder with only those variables that -v names.
_QSUB = """#!/bin/bash
set -euo pipefail
words=(); variables=(SLURM_CONF="$SLURM_CONF" HOME="$HOME" PATH="$PATH" LANG=C.UTF-8)
while [ $# -gt 0 ]; do
    case $1 in
        -v) IFS=, read -ra more <<< "$2"; shift 2
            for name in "${{more[@]}}"; do
                case $name in *=*) variables+=("$name") ;; *) variables+=("$name=${{!name}}") ;; esac
            done ;;
        *) words+=("${{1%.{first}}}"); shift ;;
    esac
done
number=$(env -i "${{variables[@]}}" /usr/bin/qsub -wd "$HOME" -o "$PWD/job.o%j" -j oe "${{words[@]}}")
case $number in *[!0-9]*) echo "$number" >&2; exit 1 ;; esac
echo "$number.{first}"
"""
_QDEL = """#!/bin/bash
exec /usr/bin/qdel "${{@%.{first}}}"
"""
# Debian's qstat gives the start of a job another name than PBS Pro does.
_QSTAT = """#!/bin/bash
set -o pipefail
/usr/bin/qstat "${{@%.{first}}}" | sed 's/^\\tmtime = /    stime = /; s/^\\t/    /'
"""


class Cluster:
    """A scheduler on hosts that are configured with 64 cores each.

    Attributes:
        hosts: the hosts.
        kind: "slurm" or "pbs".
    """

    def __init__(self, hosts: Hosts, kind: str) -> None:
        """Start the scheduler, and wait until every host is idle."""
        if os.geteuid() != 0:
            give_up("Slurm's daemons start as root only")
        require("slurmctld", "slurmd", "munged", "sbatch", "srun", *(["qsub"] if kind == "pbs" else []))
        self.hosts = hosts
        self.kind = kind
        self.folder = hosts.folder / kind
        self.folder.mkdir()
        (self.folder / "state").mkdir()
        self._configure()
        self.environment = hosts.environment(SLURM_CONF=str(self.folder / "slurm.conf"))
        self._daemons: list[subprocess.Popen[str]] = []
        self._start_daemons()

    def _configure(self) -> None:
        folder, first = self.folder, self.hosts.names[0]
        values = {"folder": folder, "first": first, "names": ",".join(self.hosts.names)}
        is_pbs = self.kind == "pbs"
        values["kill_seconds"] = 10 if is_pbs else 30
        values["prolog"] = f"TaskProlog={folder}/prolog" if is_pbs else ""
        (folder / "slurm.conf").write_text(_CONF.format(**values))
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        if is_pbs:
            # Such a job begins with a login shell, which resets PATH.
            path = f"{self.hosts.folder}/mpich:{self.hosts.folder}/bin"
            (self.hosts.home / ".profile").write_text(f'export PATH="{path}:$PATH"\n')
            write_program(folder / "prolog", _PBS_PROLOG.format(**values))
            for name, text in (("qsub", _QSUB), ("qstat", _QSTAT), ("qdel", _QDEL)):
                write_program(self.hosts.folder / "bin" / name, text.format(**values))

    def _start_daemons(self) -> None:
        first = self.hosts.names[0]
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log"}
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self._start(first, "munged", "--foreground", "--force", f"--seed-file={self.folder / 'munge.seed'}", *options)
        wait_until((self.folder / "munge.socket").exists, "munged", _START_SECONDS, self.folder / "munged.log")
        self._start(first, "slurmctld", "-D")
        for name in self.hosts.names:
            self._start(name, "slurmd", "-D", "-N", name)
        wait_until(self._is_idle, "an idle cluster", _START_SECONDS, self.folder / "slurmctld.log")

    def _start(self, host: str, *words: str) -> None:
        log = self.folder / f"{words[0]}.{host}.out"
        self._daemons.append(self.hosts.start(host, *words, log=log, environment=self.environment))

    def _is_idle(self) -> bool:
        states = self.ask("sinfo", "-h", "-N", "-o", "%T").stdout.split()
        return len(states) == len(self.hosts.names) and set(states) == {"idle"}

    def ask(self, *words: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run one of the scheduler's commands on the first host, in a folder."""
        first = self.hosts.names[0]
        return self.hosts.run(first, *words, folder=folder, environment=self.environment, timeout=60)

    def submit(self, *words: str | Path, folder: Path) -> str:
        """Submit a job with `sbatch` or `qsub` from a folder, and return its number."""
        done = self.ask("qsub" if self.kind == "pbs" else "sbatch", *words, folder=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        numbers = re.findall(r"\d+", done.stdout)
        assert numbers, done.stdout
        return str(numbers[0])

    def jobs(self) -> dict[str, str]:
        """The state of every job, also of those that have ended, by its number."""
        lines = self.ask("squeue", "-h", "-t", "all", "-o", "%i %T").stdout.splitlines()
        return dict(line.split() for line in lines)

    def wait(self, seconds: float) -> dict[str, str]:
        """Wait until no job is running or queued, and return the states of all."""
        deadline = time.monotonic() + seconds
        while set((jobs := self.jobs()).values()) - set(_ENDED):
            assert time.monotonic() < deadline, f"jobs still there after {seconds:.0f} s: {jobs}"
            time.sleep(0.5)
        return jobs

    def close(self) -> None:
        """End the jobs and the daemons."""
        for job in [job for job, state in self.jobs().items() if state not in _ENDED]:
            self.ask("scancel", "--full", job)
        self._stop_daemons()

    def _stop_daemons(self) -> None:
        self.ask("scontrol", "shutdown")
        munge = (self.folder / "munge.pid").read_text().strip()
        # A daemon that does not end, because it waits for another one, ends with its host.
        with contextlib.suppress(subprocess.TimeoutExpired):
            for daemon in self._daemons[1:]:
                daemon.wait(20)
        self.ask("kill", munge)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._daemons[0].wait(20)


def log_of(folder: Path) -> str:
    """The logs of the jobs that were submitted from a folder."""
    # Names of the templates' logs, and sbatch's default.
    matches = {path: re.search(r"\.o(\d+)$|^slurm-(\d+)\.out$", path.name) for path in folder.iterdir()}
    logs = sorted((int(match[1] or match[2]), path) for path, match in matches.items() if match)
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for _, path in logs)
