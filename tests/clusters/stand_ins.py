"""Stand-ins for mpiexec and srun, which record what the real ones would run on each host."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSIONS = {
    "MPICH": "HYDRA build details:\n    Version:                                 4.0.2\n    Process Manager:  pmi",
    "Open MPI": "mpiexec (OpenRTE) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/",
    "PALS": "mpiexec version 1.2.12 (PALS) revision 4cd7e18",
}

# The head of all stand-ins: it parses the words before the command, and defines how a start is recorded.
_HEAD = """#!{python}
import json, os, sys
words, records = sys.argv[1:], {records!r}

def value(*flags):
    return next((words[i + 1] for i, word in enumerate(words) if word in flags), None)

def write(host, command, environment):
    environment = dict(environment)
    while command[0] == "env" or "=" in command[0]:
        if command[0] != "env":
            environment.__setitem__(*command[0].split("=", 1))
        command = command[1:]
    with open(records, "a") as file:
        file.write(json.dumps(dict(host=host, command=command, environment=environment, folder=os.getcwd())) + chr(10))
"""

_MPIEXEC = (
    _HEAD
    + """
kind = {kind!r}
if words == ["--version"]:
    print({version!r})
    sys.exit()
hosts = open(value("--hostfile", "-f")).read().split()
count = int(value("-np", "-n"))
if kind == "Open MPI":
    # By default the cores of the first host are its slots, and only PATH is passed on.
    per_host = 1 if value("--map-by") == "ppr:1:node" else 64
    known = ["PATH", "HOME", *(words[i + 1] for i, word in enumerate(words) if word == "-x")]
    taken = {{name: os.environ[name] for name in known}}
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
else:
    per_host = int(value("-ppn", "--ppn") or (64 if kind == "PALS" else 1))
    taken = dict(os.environ)
    names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS")
bound = {{"Open MPI": ("--bind-to", "none"), "PALS": ("--cpu-bind", "none")}}.get(kind)
assert bound is None or value(bound[0]) == bound[1], words
for rank in range(count):
    host = hosts[rank // per_host % len(hosts)]
    numbers = dict(zip(names, map(str, (rank, count, min(per_host, count)))))
    write(host, words[words.index("env"):], {{**taken, **numbers}})
"""
)

_SRUN = (
    _HEAD
    + """
hosts = {hosts!r}
count = int(value("--nodes"))
assert count == int(value("--ntasks")) and value("--ntasks-per-node") == "1", words
assert "--cpu-bind=none" in words and "--export=ALL" in words, words
command = words[words.index({python!r}):]
for rank, host in enumerate(hosts[:count]):
    step = dict(SLURM_PROCID=str(rank), SLURM_NODEID=str(rank), SLURM_STEP_NUM_TASKS=str(count))
    write(host, command, {{**os.environ, **step, "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"]}})
"""
)

# Stands for python, which a single host starts without mpiexec or srun.
_PYTHON = _HEAD + "\nwrite({hosts!r}[0], [{python!r}, *words], os.environ)\n"

# The parts of torch that a launcher needs: an agent that records its call.
_TORCH = {
    "torch/__init__.py": "class accelerator:\n    is_available = staticmethod(lambda: False)\n",
    "torch/distributed/__init__.py": "",
    "torch/distributed/elastic/multiprocessing/api.py": "class SignalException(Exception): pass\n",
    "torch/distributed/elastic/multiprocessing/errors.py": "class ChildFailedError(Exception): pass\n",
    "torch/distributed/elastic/rendezvous/__init__.py": "class RendezvousError(Exception): pass\n",
    "torch/distributed/run.py": """import json, os
parse_args = list
def run(words):
    record = dict(command=words, folder=os.getcwd(), environment=dict(os.environ))
    open({records!r}, "a").write(json.dumps(record) + chr(10))
""",
}


def install_torch(folder: Path, records: Path) -> None:
    """Write a stand-in for torch into a folder for PYTHONPATH; its agent records its call."""
    for name, text in _TORCH.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.format(records=str(records)))


@dataclass(frozen=True)
class Recorder:
    """The folder of the stand-ins, which is first on PATH, and their records."""

    folder: Path

    @property
    def records_file(self) -> Path:
        return self.folder / "records"

    @property
    def records(self) -> list[dict[str, Any]]:
        """One record for each started process: host, command, environment, folder."""
        if not self.records_file.exists():
            return []
        return [json.loads(line) for line in self.records_file.read_text().splitlines()]

    def install(self, kind: str, hosts: list[str]) -> Path:
        """Write the stand-ins for one kind of mpiexec, and return the path of the one for python."""
        texts = {"mpiexec": _MPIEXEC, "srun": _SRUN, "python": _PYTHON}
        for name, text in texts.items():
            path = self.folder / name
            facts = {"records": str(self.records_file), "kind": kind, "version": VERSIONS[kind], "hosts": hosts}
            # The first line needs the real python, the rest names the stand-in.
            shebang, _, rest = text.partition("\n")
            filled = rest.format(python=str(self.folder / "python"), **facts)
            path.write_text(f"{shebang.format(python=sys.executable)} -SE\n{filled}")
            path.chmod(0o755)
        return self.folder / "python"
