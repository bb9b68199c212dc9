"""mpiexec of each kind, and srun."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm.clusters.mpi_launchers import LAUNCHERS, UNKNOWN, find_launcher, mpiexec_line, srun_line
from llm.config.errors import UserError
from tests.clusters.stand_ins import VERSIONS

KINDS = {launcher.name: launcher for launcher in LAUNCHERS}


def mpiexec(folder: Path, says: str, *, name: str = "mpiexec") -> dict[str, str]:
    """An environment in which mpiexec says that of its version."""
    folder.mkdir(exist_ok=True, parents=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\ncat << END\n{says}\nEND\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("kind", VERSIONS)
def test_mpiexec_when_asked_for_its_version_then_its_kind_is_known(kind: str, tmp_path: Path) -> None:
    program, launcher = find_launcher(mpiexec(tmp_path, VERSIONS[kind]))
    assert program == str(tmp_path / "mpiexec")
    assert launcher.name == kind


@pytest.mark.parametrize(
    ("says", "kind"),
    [("mpirun (Open MPI) 5.0.3", "Open MPI"), ("Intel(R) MPI Library for Linux* OS, Version 2021.9", "MPICH")],
)
def test_mpiexec_when_it_is_a_relative_then_is_told_the_same(says: str, kind: str, tmp_path: Path) -> None:
    assert find_launcher(mpiexec(tmp_path, says))[1].name == kind


def test_mpiexec_when_only_its_path_says_pals_then_is_known(tmp_path: Path) -> None:
    environment = mpiexec(tmp_path / "opt" / "cray" / "pals" / "1.2" / "bin", "mpiexec version 1.2.12")
    assert find_launcher(environment)[1].name == "PALS"


def test_mpiexec_when_of_no_known_kind_then_gets_the_words_that_all_share(tmp_path: Path) -> None:
    program, launcher = find_launcher(mpiexec(tmp_path, "something else"))
    assert launcher is UNKNOWN
    line = mpiexec_line(program, launcher, Path("hosts"), 3, {"A": "1"})
    assert line == [program, "--hostfile", "hosts", "-np", "3", "env", "A=1"]


def test_mpiexec_when_there_is_none_then_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none on PATH; load the module"):
        find_launcher({"PATH": str(tmp_path)})
    with pytest.raises(UserError, match="no srun on PATH"):
        srun_line(2, {"PATH": str(tmp_path)})


def test_variables_when_passed_on_then_are_those_that_are_not_of_this_host_or_secret() -> None:
    environment = {"PYTHONPATH": "/x y", "HOSTNAME": "a", "PMI_RANK": "0", "BASH_FUNC_x%%": "() {", "HF_TOKEN": "hush"}
    line = mpiexec_line("mpiexec", KINDS["MPICH"], Path("hosts"), 2, environment)
    assert line[line.index("env") :] == ["env", "PYTHONPATH=/x y"]
    line = mpiexec_line("mpiexec", KINDS["Open MPI"], Path("hosts"), 2, environment)
    assert line[line.index("-x") : line.index("-x") + 2] == ["-x", "HF_TOKEN"]  # its name alone
    assert line[line.index("env") :] == ["env", "PYTHONPATH=/x y"]


def test_proxy_when_its_address_holds_a_password_then_is_a_secret_and_else_is_passed_on() -> None:
    proxies = {"http_proxy": "http://me:hush@proxy:3128", "https_proxy": "http://proxy:3128"}
    line = mpiexec_line("mpiexec", KINDS["Open MPI"], Path("hosts"), 2, proxies)
    assert line[line.index("-x") :] == ["-x", "http_proxy", "env", "https_proxy=http://proxy:3128"]
