"""``python -m llm.launch``: from one laptop to the hosts of a PBS or Slurm job."""

from __future__ import annotations

import logging
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from llm.clusters.allocation import JobAllocation, check_agents, find_allocation
from llm.clusters.job_chain import Chain, chain_number, judge
from llm.clusters.sites import Scheduler, read_site
from llm.clusters.trainer_command import check_chain, read_trainer
from llm.config.durations import parse_duration
from llm.config.errors import Stopped, UsageError, UserError
from llm.config.exit_codes import run_command
from llm.config.launch import DoctorOptions, JobOptions, MeetingOptions, NodeOptions, ScriptOptions
from llm.config.option import OptionGroup
from llm.config.reader import read_options

T = TypeVar("T", bound=OptionGroup)

PROGRAM = "python -m llm.launch"
_MISTAKES = (UserError.exit_code, UsageError.exit_code)
_STEPS_OF_DOCTOR = 12  # more than there are, each of which ends in time: for a launcher that does not
_HELP = """\
usage: python -m llm.launch COMMAND [--OPTION VALUE ...] -- [MODULE] [OPTIONS OF THE TRAINER ...]

Starts a trainer (MODULE, llm.trainers.gpt if none is named) on one host or many.

  node     once on each host: starts its processes with torchrun
  job      once in a job, as the last line of its script: runs `node` on every host, and queues the next job
  pbs      prints a job script for PBS, or submits it
  slurm    prints a job script for Slurm, or submits it
  doctor   looks at the hosts of an allocation, and says what to mend

`python -m llm.launch COMMAND --help` lists a command's options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Starts, prints or submits, and returns the exit code."""
    return run_command(lambda: _launch(list(sys.argv[1:] if argv is None else argv)))


def _launch(argv: list[str]) -> int:
    command, words = (argv[0], argv[1:]) if argv else ("--help", [])
    commands: dict[str, Callable[[list[str]], int]] = {
        "node": _node,
        "job": _job,
        "pbs": lambda given: _script("pbs", given),
        "slurm": lambda given: _script("slurm", given),
        "doctor": _doctor,
        "agent": _agent,
        "worker": _worker,
    }
    if command in ("--help", "-h", "help"):
        print(_HELP, end="")
        return 0
    if command not in commands:
        raise UsageError(f"{command}: unknown command; it is one of node, job, pbs, slurm, doctor")
    return commands[command](words)


def _node(argv: list[str]) -> int:
    """Becomes torchrun's agent on this host: signals reach it, and its exit code is the scheduler's."""
    from llm.clusters.torchrun_agent import agent_command, agent_environment, check_meeting, count_accelerators
    from llm.system.cpu_threads import num_free_cores

    options, rest = _read(NodeOptions, argv, "node", "Starts the processes of this host, and meets the other hosts.")
    place = _place(options, is_step=True)
    _leave_home(place)
    trainer = read_trainer(rest)
    check_agents(place)
    check_meeting(place, port=options.port, interface=options.interface)
    nproc = options.nproc or count_accelerators() or 1
    command = agent_command(
        place,
        ["-m", "llm.launch", "worker", trainer.module, *trainer.words],
        nproc=nproc,
        max_restarts=options.max_restarts,
        port=options.port,
    )
    environment = agent_environment(
        place, os.environ, nproc=nproc, num_cores=num_free_cores(), interface=options.interface
    )
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)


def _agent(argv: list[str]) -> int:
    """torchrun, as `node` calls it."""
    from llm.clusters.torchrun_agent import run_agent

    return run_agent(argv)


def _worker(argv: list[str]) -> int:
    """One of the agent's processes; to the agent a run that stopped with everything saved has not failed.

    It would start the processes again otherwise, a few seconds before the end of the job. It also would where the
    trainer ended by itself because of a mistake: those starts end at once, without a second word.
    """
    from llm.clusters.torchrun_agent import mistake_file

    mistake = mistake_file()
    if mistake is not None and mistake.exists():
        return int(mistake.read_text())
    sys.argv = list(argv)
    try:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code == Stopped.exit_code:
            return 0
        # The others may only have heard that the first one crashed, which is worth another start.
        if mistake is not None and os.environ.get("RANK") == "0" and end.code in _MISTAKES:
            mistake.write_text(str(end.code))
        raise
    return 0


def _job(argv: list[str]) -> int:
    """Runs the trainer on all hosts of the job, and says how the run stands after that."""
    from llm.clusters.multi_host import spread
    from llm.clusters.walltime import job_end

    _speak()
    options, rest = _read(JobOptions, argv, "job", "Runs the trainer on every host of this job, and waits for it.")
    trainer = read_trainer(rest)
    if options.chain > 1:
        check_chain(trainer)
    place = _place(options, is_step=False)
    chain = Chain(place, options.script, chain_number(), options.chain)
    before = _status(trainer.run_dir)
    if chain.is_follower and before.get("state") in ("done", "failed"):
        print(f"chain: nothing is left to do, the run is {before['state']}")
        return 0 if before["state"] == "done" else UserError.exit_code
    end = job_end()
    environment = {**os.environ, **({} if end is None else {"LLM_END_TIME": f"{end:.0f}"})}
    queued = chain.queue_next()
    words = [*_words(options, "nproc", "port", "interface", "max_restarts"), "--", trainer.module, *trainer.words]
    try:
        code = spread(place, words, environment, container=options.container)
    except UserError:
        if queued:
            chain.withdraw(queued)
        raise
    exit_code, is_over = judge(before, _status(trainer.run_dir), code, is_kept=trainer.is_kept)
    if queued and is_over:
        chain.withdraw(queued)
    _say_status_line(trainer.run_dir, exit_code)
    return exit_code


def _script(scheduler: Scheduler, argv: list[str]) -> int:
    """Prints or submits a job script."""
    from llm.clusters.job_scripts import DEFAULT_SETUP, Request, job_script

    title = {"pbs": "PBS", "slurm": "Slurm"}[scheduler]
    options, rest = _read(ScriptOptions, argv, scheduler, f"Prints a job script for {title}, or submits it.")
    trainer = read_trainer(rest)
    if options.chain > 1:
        check_chain(trainer, resumes=True)
    try:
        walltime = parse_duration(options.walltime)
    except ValueError as error:
        raise UsageError(f"--walltime {options.walltime}: {error}") from None
    request = Request(
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
    text = job_script(scheduler, site, request, trainer.module, trainer.words)
    if options.submit:
        return _submit(scheduler, options, text)
    print(text, end="")
    return 0


def _submit(scheduler: Scheduler, options: ScriptOptions, text: str) -> int:
    program, ending = ("qsub", "pbs") if scheduler == "pbs" else ("sbatch", "sbatch")
    if options.account is None and options.site != "generic":
        raise UsageError(f"--submit: {options.site} wants to know who pays; give --account NAME")
    path = Path(f"{options.name}.{ending}")
    try:
        if path.exists() and path.read_text() != text:
            raise UserError(f"{path} is there already, and another script; remove it, or give another --name")
        path.write_text(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written here ({error.strerror}); submit from another folder") from None
    try:
        done = subprocess.run([program, str(path)], stdin=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        raise UserError(f"there is no {program} here; the script is in {path}, submit it where there is one") from None
    if done.returncode != 0:
        path.unlink()  # it would be in the way of the one that is mended
        raise UserError(f"{program} did not take {path} (exit code {done.returncode})")
    return 0


def _doctor(argv: list[str]) -> int:
    """Starts one agent on each host, of which the first one says what to mend; with `--inside` this is one."""
    from llm.clusters.multi_host import spread

    options, rest = _read(DoctorOptions, argv, "doctor", "Looks at the hosts of an allocation, and says what to mend.")
    if rest:
        raise UsageError(f"{rest[0]}: unexpected word; the doctor starts no trainer")
    place = _place(options, is_step=options.inside)
    _leave_home(place)
    if options.inside:
        return _examine(place, options)
    _speak()
    words = ["--inside", *_words(options, "nproc", "port", "interface", "seconds"), *["--use_cpu"] * options.use_cpu]
    words += ["--folder", str(Path(options.folder).expanduser().absolute())]
    code = spread(place, words, os.environ, command="doctor", limit_seconds=_STEPS_OF_DOCTOR * options.seconds)
    return 0 if code == 0 else UserError.exit_code


def _examine(place: JobAllocation, options: DoctorOptions) -> int:
    """The doctor's agent on this host."""
    # Before torch reads it: else each address without a name is a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from llm.clusters.doctor.doctor import examine
    from llm.clusters.torchrun_agent import agent_environment, check_meeting, count_accelerators
    from llm.system.cpu_threads import num_free_cores

    check_agents(place)
    check_meeting(place, port=options.port, interface=options.interface)
    nproc = options.nproc or (0 if options.use_cpu else count_accelerators()) or 1
    cores, interface = num_free_cores(), options.interface
    os.environ.update(agent_environment(place, os.environ, nproc=nproc, num_cores=cores, interface=interface))
    examination = examine(place, options, nproc=nproc)
    for line in examination.lines:
        print(line, flush=True)
    if examination.problem:
        raise UserError(examination.problem)
    return 0


def _read(table: type[T], argv: list[str], command: str, description: str) -> tuple[T, list[str]]:
    """The command's own options, and the words behind `--`."""
    at = argv.index("--") if "--" in argv else len(argv)
    try:
        return read_options(table, argv[:at], prog=f"{PROGRAM} {command}", description=description), argv[at + 1 :]
    except UsageError as error:
        is_trainers = at == len(argv) and re.search("unknown|unexpected", str(error))
        hint = "\noptions of the trainer stand behind --" if is_trainers and table is not DoctorOptions else ""
        raise UsageError(f"{error}{hint}") from None


def _place(options: MeetingOptions, *, is_step: bool) -> JobAllocation:
    return find_allocation(
        hosts=options.hosts, hostfile=options.hostfile, rank=options.rank, job=options.job, is_step=is_step
    )


def _words(options: OptionGroup, *rows: str) -> list[str]:
    """Options as they are handed on to the agents."""
    return [word for row in rows if (value := getattr(options, row)) is not None for word in (f"--{row}", str(value))]


def _leave_home(place: JobAllocation) -> None:
    """PBS starts a job at home, where nobody wants to be, and not where it was submitted."""
    folder = os.environ.get("PBS_O_WORKDIR")
    if place.scheduler == "pbs" and folder and Path.cwd() == Path.home() and Path(folder).is_dir():
        os.chdir(folder)


def _status(run_dir: Path | None) -> Mapping[str, object]:
    from llm.training.run_dir.inspect import read_run

    return read_run(run_dir, verify=False).status if run_dir is not None else {}


def _say_status_line(run_dir: Path | None, exit_code: int) -> None:
    from llm.training.run_dir.inspect import read_run, status_line

    said = f"{run_dir}: {status_line(read_run(run_dir, verify=False))}" if run_dir is not None else "nothing is kept"
    print(f"job: exit code {exit_code}; {said}", flush=True)


def _speak() -> None:
    """Lines of the logger go to the standard output, as a job's log is one file."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")


if __name__ == "__main__":
    sys.exit(main())
