"""Job scripts: what every site's say, and that shells take them."""

from __future__ import annotations

import itertools
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import llm.launch
from llm.clusters.job_scripts import Request, job_script
from llm.clusters.sites import known_sites, read_site
from llm.config.errors import UserError

ROOT = Path(__file__).parents[2]
TEMPLATES = {
    "jobs/pbs/pretrain.pbs": "pbs --site polaris -- --config examples/polaris_gpt_neo_125m.toml",
    "jobs/pbs/finetune.pbs": "pbs --site polaris --name finetune --nodes 1 -- --config examples/gpt2_finetune.toml",
    "jobs/slurm/pretrain.sbatch": "slurm -- --config examples/polaris_gpt_neo_125m.toml",
}
AWKWARD = 'it\'s "$HOME" `x` *'
REQUEST = Request(name="gpt", nodes=4, walltime_seconds=5400, account="me", chain=3, nproc=4)


def of_every_site() -> list[tuple[str, str]]:
    pairs = itertools.product(known_sites(), ("pbs", "slurm"))
    return [(name, scheduler) for name, scheduler in pairs if _runs(name, scheduler)]


def _runs(name: str, scheduler: str) -> bool:
    try:
        read_site(name, scheduler)  # type: ignore[arg-type]
    except UserError:
        return False
    return True


def script(name: str, scheduler: str, request: Request = REQUEST, words: list[str] | None = None) -> str:
    site = read_site(name, scheduler)  # type: ignore[arg-type]
    return job_script(scheduler, site, request, "llm.trainers.gpt", words or [])  # type: ignore[arg-type]


def launched(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert llm.launch.main(shlex.split(words)) == 0
    return capsys.readouterr().out


def test_sites_when_listed_then_are_those_that_are_promised() -> None:
    assert known_sites() == ("aurora", "frontier", "generic", "perlmutter", "polaris")
    assert len(of_every_site()) == 6  # generic has both schedulers


@pytest.mark.parametrize(("name", "scheduler"), of_every_site())
@pytest.mark.parametrize("checker", [["bash", "-n"], ["shellcheck"]], ids=lambda words: words[0])
def test_script_when_checked_then_is_clean(name: str, scheduler: str, checker: list[str], tmp_path: Path) -> None:
    if shutil.which(checker[0]) is None:
        pytest.skip(f"{checker[0]} is not installed (apt install {checker[0]})")
    path = tmp_path / "job"
    request = Request("gpt", 2, 60, container="apptainer exec --nv 'my gpt.sif'", setup=("module load a b",))
    for text in (script(name, scheduler), script(name, scheduler, request, ["--run_name", AWKWARD, "--config", "x"])):
        path.write_text(text)
        done = subprocess.run([*checker, str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "scheduler"), of_every_site())
def test_script_when_printed_then_asks_for_what_was_asked(name: str, scheduler: str) -> None:
    text = script(name, scheduler)
    sign = {"pbs": "#PBS", "slurm": "#SBATCH"}[scheduler]
    directives = [line for line in text.splitlines() if line.startswith(sign)]
    joined = "\n".join(directives)
    assert "1:30:00" in joined
    assert ("select=4" if scheduler == "pbs" else "--nodes=4") in joined
    assert (f"{sign} -A me" if scheduler == "pbs" else f"{sign} --account=me") in directives
    assert "{" not in joined
    # A scheduler reads no directive behind the first command.
    assert text.rindex(f"\n{sign}") < text.index("\nset -euo pipefail")
    assert text.count("# Edit ") == 3
    assert "--nproc 4" in text
    assert '"${CHAIN:-3}"' in text


def test_site_when_described_then_says_who_ran_it() -> None:
    for path in (ROOT / "llm" / "clusters" / "sites").glob("*.toml"):
        first = path.read_text().splitlines()[0]
        assert first.startswith("# ")
        assert "nobody has run this file there yet" in first or "run in the tests" in first


@pytest.mark.parametrize(("path", "words"), TEMPLATES.items())
def test_template_when_compared_then_is_what_the_printer_prints(
    path: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / path).read_text()
    assert text == launched(words, capsys)
    assert text.count("# Edit ") == 3
    assert len(text.splitlines()) <= 32


def options_in(text: str, folder: Path, **variables: str) -> list[str]:
    """What bash makes of the array."""
    array = text[text.index("OPTIONS=(") : text.index("\n)\n") + 3]
    program = folder / "words"
    program.write_text(f"{array}printf '%s\\0' \"${{OPTIONS[@]}}\"\n")
    done = subprocess.run(["bash", str(program)], env={"HOME": "/h", **variables}, capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def test_options_when_awkward_then_reach_the_trainer_as_they_are(tmp_path: Path) -> None:
    words = [
        "--run_name",
        AWKWARD,
        "--train_file",
        "a b.txt",
        "c.txt",
        "--sample_prompt=x  y",
        "--max_train_steps",
        "3",
    ]
    assert options_in(script("generic", "pbs", words=words), tmp_path) == [*words, "--resume_from_checkpoint"]
    words = ["--run_name", "two\nlines", "--resume_from_checkpoint", "best"]
    assert options_in(script("generic", "slurm", words=words), tmp_path) == words


def test_config_when_the_submission_names_another_then_that_one_is_taken(tmp_path: Path) -> None:
    text = script("generic", "pbs", words=["--config", "a.toml", "--max_train_steps", "3"])
    assert options_in(text, tmp_path)[:2] == ["--config", "a.toml"]
    assert options_in(text, tmp_path, CONFIG="my b.toml")[:2] == ["--config", "my b.toml"]
    awkward = script("generic", "pbs", words=["--config", "a$b.toml"])
    assert options_in(awkward, tmp_path)[:2] == ["--config", "a$b.toml"]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request("1 x", 1, 60), "--name '1 x': must be a letter"),
        (Request("x", 1, 60, account="a b"), "--account 'a b': must be one word"),
        (Request("x", 1, 60, queue="q\n#PBS -A x"), "--queue .* must be one word"),
        (Request("x", 1, 60, setup=("a\nb",)), "--setup: give one line"),
    ],
)
def test_request_when_no_scheduler_would_read_it_right_then_is_refused(request_: Request, said: str) -> None:
    with pytest.raises(UserError, match=said):
        script("generic", "pbs", request_)


def test_site_when_unknown_or_of_another_scheduler_then_says_so(tmp_path: Path) -> None:
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


def test_site_when_a_file_of_ones_own_then_is_used(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    tables = ['container = "apptainer exec x.sif"', "[environment]", 'A = "b c"', "[slurm]"]
    path.write_text("\n".join([*tables, 'directives = ["--nodes={nodes} --mem=0"]']))
    text = script(str(path), "slurm")
    assert "\n#SBATCH --nodes=4 --mem=0\n" in text
    assert '\n  export A="b c"\n' in text
    assert '--container "apptainer exec x.sif"' in text
