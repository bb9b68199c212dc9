"""mpiexec of each kind, and srun."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm.clusters.mpi_launchers import (
    MPI_LAUNCHERS,
    UNKNOWN_LAUNCHER,
    find_mpiexec,
    mpiexec_prefix,
    srun_prefix,
    without_variables,
)
from llm.config.errors import UserError
from tests.clusters.stand_ins import VERSIONS

KINDS = {launcher.name: launcher for launcher in MPI_LAUNCHERS}


def install_mpiexec(folder: Path, version: str, *, name: str = "mpiexec") -> dict[str, str]:
    """Write an mpiexec that prints this version, and return an environment that has it on PATH."""
    folder.mkdir(exist_ok=True, parents=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\ncat << END\n{version}\nEND\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("kind", VERSIONS)
def test_mpiexec_when_its_version_is_of_a_known_kind_then_is_recognised(kind: str, tmp_path: Path) -> None:
    program, launcher = find_mpiexec(install_mpiexec(tmp_path, VERSIONS[kind]))
    assert program == str(tmp_path / "mpiexec")
    assert launcher.name == kind


@pytest.mark.parametrize(
    ("version", "kind"),
    [("mpirun (Open MPI) 5.0.3", "Open MPI"), ("Intel(R) MPI Library for Linux* OS, Version 2021.9", "MPICH")],
)
def test_mpiexec_when_derived_from_a_known_kind_then_is_of_that_kind(version: str, kind: str, tmp_path: Path) -> None:
    assert find_mpiexec(install_mpiexec(tmp_path, version))[1].name == kind


def test_mpiexec_when_only_its_path_names_pals_then_is_recognised(tmp_path: Path) -> None:
    environment = install_mpiexec(tmp_path / "opt" / "cray" / "pals" / "1.2" / "bin", "mpiexec version 1.2.12")
    assert find_mpiexec(environment)[1].name == "PALS"


def test_mpiexec_when_of_an_unknown_kind_then_gets_only_the_common_options(tmp_path: Path) -> None:
    program, launcher = find_mpiexec(install_mpiexec(tmp_path, "something else"))
    assert launcher is UNKNOWN_LAUNCHER
    words = mpiexec_prefix(program, launcher, Path("hosts"), 3, {"A": "1"})
    assert words == [program, "--hostfile", "hosts", "-np", "3", "env", "A=1"]


def test_launcher_when_it_is_missing_then_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none on PATH; load the module"):
        find_mpiexec({"PATH": str(tmp_path)})
    with pytest.raises(UserError, match="no srun on PATH"):
        srun_prefix(2, {"PATH": str(tmp_path)})


def test_variables_when_passed_on_then_local_ones_and_secrets_are_left_out() -> None:
    environment = {"PYTHONPATH": "/x y", "HOSTNAME": "a", "PMI_RANK": "0", "BASH_FUNC_x%%": "() {", "HF_TOKEN": "hush"}
    words = mpiexec_prefix("mpiexec", KINDS["MPICH"], Path("hosts"), 2, environment)
    assert words[words.index("env") :] == ["env", "PYTHONPATH=/x y"]
    words = mpiexec_prefix("mpiexec", KINDS["Open MPI"], Path("hosts"), 2, environment)
    assert words[words.index("-x") : words.index("-x") + 2] == ["-x", "HF_TOKEN"]  # the name without the value
    assert words[words.index("env") :] == ["env", "PYTHONPATH=/x y"]


def test_proxy_when_its_address_holds_a_password_then_counts_as_a_secret() -> None:
    proxies = {"http_proxy": "http://me:hush@proxy:3128", "https_proxy": "http://proxy:3128"}
    words = mpiexec_prefix("mpiexec", KINDS["Open MPI"], Path("hosts"), 2, proxies)
    assert words[words.index("-x") :] == ["-x", "http_proxy", "env", "https_proxy=http://proxy:3128"]


def test_srun_when_it_exists_then_starts_one_task_per_host(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    words = srun_prefix(3, {"PATH": str(tmp_path)})
    assert words[:7] == [str(tmp_path / "srun"), "--nodes", "3", "--ntasks", "3", "--ntasks-per-node", "1"]
    assert words[7:] == ["--cpu-bind=none", "--kill-on-bad-exit=0", "--export=ALL"]


def test_words_when_logged_then_have_no_variables() -> None:
    assert without_variables(["mpiexec", "-np", "2", "env", "A=b c", "--x=1"]) == [
        "mpiexec",
        "-np",
        "2",
        "env",
        "--x=1",
    ]
