"""Descriptions of computing centres: those of this package, and a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

import llm.clusters.sites
from llm.clusters.sites import Scheduler, known_sites, read_site
from llm.config.errors import UserError

FOLDER = Path(llm.clusters.sites.__file__).parent


def test_sites_when_listed_then_are_those_of_the_documentation() -> None:
    assert known_sites() == ("aurora", "frontier", "generic", "perlmutter", "polaris")


@pytest.mark.parametrize(
    ("name", "scheduler", "queue"),
    [
        ("polaris", "pbs", "debug"),
        ("perlmutter", "slurm", "regular"),
        ("generic", "pbs", None),
        ("generic", "slurm", None),
    ],
)
def test_site_when_read_by_its_name_then_has_lines_for_its_scheduler(
    name: str, scheduler: Scheduler, queue: str | None
) -> None:
    lines = read_site(name, scheduler).lines_for(scheduler)
    assert lines is not None
    assert lines.queue == queue
    assert any("{nodes}" in line for line in lines.directives)


def test_site_when_described_then_the_first_line_says_whether_it_was_run_there() -> None:
    for path in FOLDER.glob("*.toml"):
        first = path.read_text().splitlines()[0]
        assert first.startswith("# ")
        assert "not yet run there" in first or "The tests run" in first


def test_site_when_unknown_wrong_or_of_another_scheduler_then_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean polaris"):
        read_site("polarix", "pbs")
    with pytest.raises(UserError, match=r"does not run slurm; use `python -m llm\.launch pbs`"):
        read_site("polaris", "slurm")
    path = tmp_path / "mine.toml"
    path.write_text('[pbs]\ndirectives = ["-l select={nodes}"]\nqeue = "debug"\n')
    with pytest.raises(UserError, match=r"pbs.qeue: extra inputs"):
        read_site(str(path), "pbs")
    path.write_text('[pbs]\ndirectives = ["-l select=2"]\n')
    with pytest.raises(UserError, match=r"pbs.directives: .*\{nodes\}"):
        read_site(str(path), "pbs")
    with pytest.raises(UserError, match="cannot be read"):
        read_site("missing.toml", "pbs")
