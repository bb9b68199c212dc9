"""The options of ``python -m llm.launch``: one table a subcommand."""

from __future__ import annotations

from llm.config.durations import DURATION_FORMATS
from llm.config.option import OptionGroup, option

# One row a line, however long: the table is read down its columns.
# fmt: off


class MeetingOptions(OptionGroup):
    """Which hosts there are, and where they meet."""

    nproc: int | None = option(None, "processes on each host (default: one an accelerator; 1 without any)", ge=1, metavar="N")
    hosts: str | None = option(None, "the hosts, with commas (default: those of PBS_NODEFILE, else Slurm's, else this one)", metavar="A,B,...")
    hostfile: str | None = option(None, "file with a host a line, as --hosts", metavar="FILE")
    rank: int | None = option(None, "number of this host among --hosts, from 0 (default: by its name, or as mpiexec or srun say)", ge=0, metavar="N")
    job: str | None = option(None, "name under which the hosts meet (default: the scheduler's job)", metavar="ID")
    port: int | None = option(None, "port on the first host where they meet (default: 20000 + the job's number mod 20000)", ge=1024, lt=65536, metavar="N")
    interface: str | None = option(None, "network interface between the hosts (default: hsn0 where there is one, else the libraries' choice)", metavar="NAME")


class AgentOptions(MeetingOptions):
    """The hosts, and what runs on each."""

    max_restarts: int = option(3, "times that a process that died is started again, from the newest checkpoint", ge=0, metavar="N")


class NodeOptions(AgentOptions):
    """The options of ``python -m llm.launch node``."""


class JobOptions(AgentOptions):
    """The options of ``python -m llm.launch job``."""

    chain: int = option(1, "jobs that the run may take in all; each queues the next one, until the run is done or failed", ge=1, metavar="K")
    script: str | None = option(None, "the job script, which the next job of the chain runs again", metavar="FILE")
    container: str | None = option(None, "what stands before python on each host, such as 'apptainer exec --nv gpt.sif'", metavar="COMMAND")


class DoctorOptions(MeetingOptions):
    """The options of ``python -m llm.launch doctor``."""

    folder: str = option(".", "folder that all hosts should see", metavar="DIR")
    seconds: float = option(60.0, "how long each step may take", gt=0, metavar="S")
    use_cpu: bool = option(False, "leave accelerators alone")
    inside: bool = option(False, "this is the agent of one host, such as the doctor starts on each")


class ScriptOptions(OptionGroup):
    """The options of ``python -m llm.launch pbs`` and ``slurm``."""

    site: str = option("generic", "polaris, aurora, perlmutter, frontier, generic, or a TOML file like theirs", metavar="NAME")
    nodes: int = option(2, "hosts", ge=1, metavar="N")
    walltime: float | str = option("1:00:00", f"longest time of one job: {DURATION_FORMATS}", metavar="TIME")
    account: str | None = option(None, "project that pays", metavar="NAME")
    queue: str | None = option(None, "queue or partition (default: the site's)", metavar="NAME")
    name: str = option("gpt", "name of the job", metavar="NAME")
    chain: int = option(1, "jobs that the run may take in all; each queues the next one, until the run is done or failed", ge=1, metavar="K")
    nproc: int | None = option(None, "processes on each host (default: one an accelerator; 1 without any)", ge=1, metavar="N")
    setup: tuple[str, ...] | None = option(None, "shell lines that make python the right one (default: put .venv/bin in front of PATH)", metavar="LINE")
    container: str | None = option(None, "what stands before python on each host, such as 'apptainer exec --nv gpt.sif' (default: the site's)", metavar="COMMAND")
    submit: bool = option(False, "write the script to NAME.pbs or NAME.sbatch and submit it, instead of printing it")
