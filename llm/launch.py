"""``python -m llm.launch``: run a trainer on one laptop, or on all hosts of a PBS or Slurm job."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from llm.clusters.allocation import JobAllocation, check_one_agent_per_host, find_allocation
from llm.clusters.job_chain import Chain, chain_number, run_outcome
from llm.clusters.sites import Scheduler, read_site
from llm.clusters.trainer_command import check_chain, read_trainer_command
from llm.config.durations import DURATION_FORMATS, parse_duration
from llm.config.errors import UsageError, UserError
from llm.config.exit_codes import run_command
from llm.config.option import OptionGroup, option
from llm.config.reader import read_options

T = TypeVar("T", bound=OptionGroup)

PROGRAM = "python -m llm.launch"
# The doctor has fewer steps, and each ends in time; the limit is for a launcher that does not end.
_DOCTOR_STEPS = 12
_HELP = """\
usage: python -m llm.launch COMMAND [--OPTION VALUE ...] -- [MODULE] [OPTIONS OF THE TRAINER ...]

Runs a trainer (MODULE, llm.trainers.gpt by default) on one host or several.

  node     run once on each host: starts this host's processes with torchrun
  job      run once in a job, as the last line of its script: runs `node` on every host, and queues the next job
  pbs      prints a job script for PBS, or submits it
  slurm    prints a job script for Slurm, or submits it
  doctor   checks the hosts of an allocation, and says what to fix

`python -m llm.launch COMMAND --help` lists a command's options.
"""

# One row a line, however long: the table is read down its columns.
# fmt: off


class RendezvousOptions(OptionGroup):
    """The hosts, and where they meet."""

    nproc: int | None = option(None, "number of processes on each host (default: one an accelerator; 1 without any)", ge=1, metavar="N")
    hosts: str | None = option(None, "the hosts, separated by commas (default: those of PBS_NODEFILE, else Slurm's, else this one)", metavar="A,B,...")
    hostfile: str | None = option(None, "file with one host a line, used like --hosts", metavar="FILE")
    rank: int | None = option(None, "index of this host among --hosts, from 0 (default: by its name, else its rank under mpiexec or srun)", ge=0, metavar="N")
    job: str | None = option(None, "name of the rendezvous (default: the scheduler's job)", metavar="ID")
    port: int | None = option(None, "port of the rendezvous on the first host (default: 20000 + the job's number mod 20000)", ge=1024, lt=65536, metavar="N")
    interface: str | None = option(None, "network interface between the hosts (default: hsn0 if it exists, else the libraries' choice)", metavar="NAME")


class AgentOptions(RendezvousOptions):
    """The hosts, and how their processes are restarted."""

    max_restarts: int = option(3, "how often the processes are restarted from the newest checkpoint because one died", ge=0, metavar="N")


class NodeOptions(AgentOptions):
    """The options of ``python -m llm.launch node``."""


class JobOptions(AgentOptions):
    """The options of ``python -m llm.launch job``."""

    chain: int = option(1, "number of jobs that the run may take; each queues the next one, until the run is done or failed", ge=1, metavar="K")
    script: str | None = option(None, "the job script, which the next job of the chain runs again", metavar="FILE")
    container: str | None = option(None, "command that is put before python on each host, such as 'apptainer exec --nv gpt.sif'", metavar="COMMAND")


class DoctorOptions(RendezvousOptions):
    """The options of ``python -m llm.launch doctor``."""

    folder: str = option(".", "folder that all hosts should share", metavar="DIR")
    seconds: float = option(60.0, "how long each step may take", gt=0, metavar="S")
    use_cpu: bool = option(False, "do not use accelerators")
    inside: bool = option(False, "be the agent of this host; the doctor starts one on each")


class ScriptOptions(OptionGroup):
    """The options of ``python -m llm.launch pbs`` and ``slurm``."""

    site: str = option("generic", "polaris, aurora, perlmutter, frontier, generic, or a TOML file like theirs", metavar="NAME")
    nodes: int = option(2, "number of hosts", ge=1, metavar="N")
    walltime: float | str = option("1:00:00", f"longest time of one job: {DURATION_FORMATS}", metavar="TIME")
    account: str | None = option(None, "project that pays", metavar="NAME")
    queue: str | None = option(None, "queue or partition (default: the site's)", metavar="NAME")
    name: str = option("gpt", "name of the job", metavar="NAME")
    chain: int = option(1, "number of jobs that the run may take; each queues the next one, until the run is done or failed", ge=1, metavar="K")
    nproc: int | None = option(None, "number of processes on each host (default: one an accelerator; 1 without any)", ge=1, metavar="N")
    setup: tuple[str, ...] | None = option(None, "shell lines that put the right python on PATH (default: put .venv/bin in front of it)", metavar="LINE")
    container: str | None = option(None, "command that is put before python on each host, such as 'apptainer exec --nv gpt.sif' (default: the site's)", metavar="COMMAND")
    submit: bool = option(False, "write the script to NAME.pbs or NAME.sbatch and submit it, instead of printing it")


# fmt: on


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code."""
    return run_command(lambda: _launch(list(sys.argv[1:] if argv is None else argv)))


def _launch(argv: list[str]) -> int:
    command = argv[0] if argv else "--help"
    commands: dict[str, Callable[[list[str]], int]] = {
        "node": _node,
        "job": _job,
        "pbs": lambda words: _script("pbs", words),
        "slurm": lambda words: _script("slurm", words),
        "doctor": _doctor,
        "agent": _agent,
        "worker": _worker,
    }
    if command in ("--help", "-h", "help"):
        print(_HELP, end="")
        return 0
    if command not in commands:
        raise UsageError(f"{command}: unknown command; it is one of node, job, pbs, slurm, doctor")
    return commands[command](argv[1:])


def _node(argv: list[str]) -> int:
    """Become torchrun's agent on this host, so that signals reach it and the scheduler sees its exit code."""
    from llm.clusters.torchrun_agent import agent_command, agent_environment, check_rendezvous, count_accelerators
    from llm.system.cpu_threads import num_free_cores

    options, rest = _read(
        NodeOptions, argv, "node", "Starts this host's processes, which join those of the other hosts."
    )
    allocation = _find_allocation(options, is_step=True)
    _enter_submit_dir(allocation)
    trainer = read_trainer_command(rest)
    check_one_agent_per_host(allocation)
    check_rendezvous(allocation, port=options.port, interface=options.interface)
    nproc = options.nproc or count_accelerators() or 1
    command = agent_command(
        allocation,
        ["-m", "llm.launch", "worker", trainer.module, *trainer.arguments],
        nproc=nproc,
        max_restarts=options.max_restarts,
        port=options.port,
    )
    environment = agent_environment(
        allocation, os.environ, nproc=nproc, num_cores=num_free_cores(), interface=options.interface
    )
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)


def _agent(argv: list[str]) -> int:
    """Run torchrun's agent; `node` calls this."""
    from llm.clusters.torchrun_agent import run_agent

    return run_agent(argv)


def _worker(argv: list[str]) -> int:
    """Run the trainer in one of the agent's processes; the agent calls this."""
    from llm.clusters.torchrun_agent import run_worker

    return run_worker(argv)


def _job(argv: list[str]) -> int:
    """Run the trainer on all hosts of the job, then print the state of the run."""
    from llm.clusters.multi_host import run_on_all_hosts
    from llm.clusters.scheduler import job_end

    _log_to_stdout()
    options, rest = _read(JobOptions, argv, "job", "Runs the trainer on every host of this job, and waits for it.")
    trainer = read_trainer_command(rest)
    if options.chain > 1:
        check_chain(trainer)
    allocation = _find_allocation(options, is_step=False)
    chain = Chain(allocation, options.script, number=chain_number(), max_jobs=options.chain)
    before = _status(trainer.run_dir)
    if chain.is_successor and before.get("state") in ("done", "failed"):
        print(f"chain: nothing is left to do: the run is {before['state']}")
        return 0 if before["state"] == "done" else UserError.exit_code
    environment = dict(os.environ)
    end = job_end()
    if end is not None:
        environment["LLM_END_TIME"] = f"{end:.0f}"
    next_job = chain.queue_next()
    words = _as_words(options, "nproc", "port", "interface", "max_restarts")
    words += ["--", trainer.module, *trainer.arguments]
    try:
        launcher_code = run_on_all_hosts(allocation, words, environment, container=options.container)
    except UserError:
        if next_job:
            chain.cancel(next_job)
        raise
    exit_code, is_over = run_outcome(before, _status(trainer.run_dir), launcher_code, keeps_status=trainer.keeps_status)
    if next_job and is_over:
        chain.cancel(next_job)
    _print_state(trainer.run_dir, exit_code)
    return exit_code


def _script(scheduler: Scheduler, argv: list[str]) -> int:
    """Print or submit a job script."""
    from llm.clusters.job_scripts import DEFAULT_SETUP, ScriptSettings, format_job_script, submit_job_script

    title = {"pbs": "PBS", "slurm": "Slurm"}[scheduler]
    options, rest = _read(ScriptOptions, argv, scheduler, f"Prints a job script for {title}, or submits it.")
    trainer = read_trainer_command(rest)
    if options.chain > 1:
        check_chain(trainer, resumes=True)
    try:
        walltime = parse_duration(options.walltime)
    except ValueError as error:
        raise UsageError(f"--walltime {options.walltime}: {error}") from None
    settings = ScriptSettings(
        name=options.name,
        nodes=options.nodes,
        walltime_seconds=walltime,
        account=options.account,
        queue=options.queue,
        chain=options.chain,
        nproc=options.nproc,
        setup=options.setup or DEFAULT_SETUP,
        container=options.container,
    )
    site = read_site(options.site, scheduler)
    text = format_job_script(scheduler, site, settings, trainer.module, trainer.arguments)
    if not options.submit:
        print(text, end="")
        return 0
    if options.account is None and options.site != "generic":
        raise UsageError(f"--submit: jobs of {options.site} need a project that pays; give --account NAME")
    submit_job_script(scheduler, options.name, text)
    return 0


def _doctor(argv: list[str]) -> int:
    """Start one agent on each host, of which the first prints what to fix; with `--inside`, be one of them."""
    from llm.clusters.multi_host import run_on_all_hosts

    options, rest = _read(DoctorOptions, argv, "doctor", "Checks the hosts of an allocation, and says what to fix.")
    if rest:
        raise UsageError(f"{rest[0]}: unexpected word; the doctor starts no trainer")
    allocation = _find_allocation(options, is_step=options.inside)
    _enter_submit_dir(allocation)
    if options.inside:
        return _doctor_agent(allocation, options)
    _log_to_stdout()
    words = ["--inside", *_as_words(options, "nproc", "port", "interface", "seconds")]
    if options.use_cpu:
        words.append("--use_cpu")
    words += ["--folder", str(Path(options.folder).expanduser().absolute())]
    code = run_on_all_hosts(
        allocation, words, os.environ, command="doctor", limit_seconds=_DOCTOR_STEPS * options.seconds
    )
    return 0 if code == 0 else UserError.exit_code


def _doctor_agent(allocation: JobAllocation, options: DoctorOptions) -> int:
    """Run the doctor's checks on this host; the first host prints the report."""
    # Must be set before torch is imported: otherwise torch logs a line for each address without a name.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from llm.clusters.doctor.doctor import examine_hosts
    from llm.clusters.torchrun_agent import agent_environment, check_rendezvous, count_accelerators
    from llm.system.cpu_threads import num_free_cores

    check_one_agent_per_host(allocation)
    check_rendezvous(allocation, port=options.port, interface=options.interface)
    num_accelerators = 0 if options.use_cpu else count_accelerators()
    nproc = options.nproc or num_accelerators or 1
    environment = agent_environment(
        allocation, os.environ, nproc=nproc, num_cores=num_free_cores(), interface=options.interface
    )
    os.environ.update(environment)
    report = examine_hosts(
        allocation,
        nproc=nproc,
        use_cpu=options.use_cpu,
        folder=Path(options.folder).expanduser(),
        port=options.port,
        seconds=options.seconds,
    )
    for line in report.lines:
        print(line, flush=True)
    if report.problem:
        raise UserError(report.problem)
    return 0


def _read(table: type[T], argv: list[str], command: str, description: str) -> tuple[T, list[str]]:
    """The command's own options, and the words behind `--`."""
    end = argv.index("--") if "--" in argv else len(argv)
    try:
        options = read_options(table, argv[:end], prog=f"{PROGRAM} {command}", description=description)
    except UsageError as error:
        may_be_trainers = end == len(argv) and table is not DoctorOptions
        if may_be_trainers and re.search("unknown|unexpected", str(error)):
            raise UsageError(f"{error}\noptions of the trainer stand behind --") from None
        raise
    return options, argv[end + 1 :]


def _find_allocation(options: RendezvousOptions, *, is_step: bool) -> JobAllocation:
    return find_allocation(
        hosts=options.hosts, hostfile=options.hostfile, rank=options.rank, job=options.job, is_step=is_step
    )


def _as_words(options: OptionGroup, *names: str) -> list[str]:
    """The options that are set, as words of a command line for the agents."""
    words: list[str] = []
    for name in names:
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name}", str(value)]
    return words


def _enter_submit_dir(allocation: JobAllocation) -> None:
    """PBS starts jobs in $HOME: change to the folder of submission."""
    folder = os.environ.get("PBS_O_WORKDIR")
    if allocation.scheduler == "pbs" and folder and Path.cwd() == Path.home() and Path(folder).is_dir():
        os.chdir(folder)


def _status(run_dir: Path | None) -> Mapping[str, object]:
    from llm.training.run_dir.inspect import read_run

    return read_run(run_dir, verify=False).status if run_dir is not None else {}


def _print_state(run_dir: Path | None, exit_code: int) -> None:
    from llm.training.run_dir.inspect import read_run, status_line

    state = f"{run_dir}: {status_line(read_run(run_dir, verify=False))}" if run_dir is not None else "nothing is kept"
    print(f"job: exit code {exit_code}; {state}", flush=True)


def _log_to_stdout() -> None:
    """Log to the standard output, because a job's log is one file."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")


if __name__ == "__main__":
    sys.exit(main())
