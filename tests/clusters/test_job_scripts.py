"""Job scripts of every site: their directives, and their words as bash reads them."""

from __future__ import annotations

import itertools
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import llm.launch
from llm.clusters.job_scripts import ScriptSettings, format_job_script, submit_job_script
from llm.clusters.sites import known_sites, read_site
from llm.config.errors import UserError

ROOT = Path(__file__).parents[2]
TEMPLATES = {
    "jobs/pbs/pretrain.pbs": "pbs --site polaris -- --config examples/polaris_gpt_neo_125m.toml",
    "jobs/pbs/finetune.pbs": "pbs --site polaris --name finetune --nodes 1 -- --config examples/gpt2_finetune.toml",
    "jobs/slurm/pretrain.sbatch": "slurm -- --config examples/polaris_gpt_neo_125m.toml",
}
AWKWARD = 'it\'s "$HOME" `x` *'
SETTINGS = ScriptSettings(name="gpt", nodes=4, walltime_seconds=5400, account="me", chain=3, nproc=4)


def sites_and_schedulers() -> list[tuple[str, str]]:
    pairs = itertools.product(known_sites(), ("pbs", "slurm"))
    return [(name, scheduler) for name, scheduler in pairs if _runs(name, scheduler)]


def _runs(name: str, scheduler: str) -> bool:
    try:
        read_site(name, scheduler)  # type: ignore[arg-type]
    except UserError:
        return False
    return True


def script(name: str, scheduler: str, settings: ScriptSettings = SETTINGS, words: list[str] | None = None) -> str:
    site = read_site(name, scheduler)  # type: ignore[arg-type]
    return format_job_script(scheduler, site, settings, "llm.trainers.gpt", words or [])  # type: ignore[arg-type]


def printed_script(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `llm.launch` prints for these words."""
    assert llm.launch.main(shlex.split(words)) == 0
    return capsys.readouterr().out


def test_sites_when_paired_with_schedulers_then_generic_has_both() -> None:
    assert len(sites_and_schedulers()) == 6


@pytest.mark.parametrize(("name", "scheduler"), sites_and_schedulers())
@pytest.mark.parametrize("checker", [["bash", "-n"], ["shellcheck"]], ids=lambda words: words[0])
def test_script_when_checked_then_is_clean(name: str, scheduler: str, checker: list[str], tmp_path: Path) -> None:
    if shutil.which(checker[0]) is None:
        pytest.skip(f"{checker[0]} is not installed (apt install {checker[0]})")
    path = tmp_path / "job"
    settings = ScriptSettings("gpt", 2, 60, container="apptainer exec --nv 'my gpt.sif'", setup=("module load a b",))
    for text in (script(name, scheduler), script(name, scheduler, settings, ["--run_name", AWKWARD, "--config", "x"])):
        path.write_text(text)
        done = subprocess.run([*checker, str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "scheduler"), sites_and_schedulers())
def test_script_when_formatted_then_requests_what_the_settings_say(name: str, scheduler: str) -> None:
    text = script(name, scheduler)
    sign = {"pbs": "#PBS", "slurm": "#SBATCH"}[scheduler]
    directives = [line for line in text.splitlines() if line.startswith(sign)]
    joined = "\n".join(directives)
    assert "1:30:00" in joined
    assert ("select=4" if scheduler == "pbs" else "--nodes=4") in joined
    assert (f"{sign} -A me" if scheduler == "pbs" else f"{sign} --account=me") in directives
    assert "{" not in joined
    # A scheduler ignores directives after the first command.
    assert text.rindex(f"\n{sign}") < text.index("\nset -euo pipefail")
    assert text.count("# Edit ") == 3
    assert "--nproc 4" in text
    assert '"${CHAIN:-3}"' in text


@pytest.mark.parametrize(("path", "words"), TEMPLATES.items())
def test_template_when_compared_then_is_what_the_command_prints(
    path: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / path).read_text()
    assert text == printed_script(words, capsys)
    assert text.count("# Edit ") == 3
    assert len(text.splitlines()) <= 32


def options_in(text: str, folder: Path, **variables: str) -> list[str]:
    """The words of the array OPTIONS, as bash reads them."""
    array = text[text.index("OPTIONS=(") : text.index("\n)\n") + 3]
    program = folder / "words"
    program.write_text(f"{array}printf '%s\\0' \"${{OPTIONS[@]}}\"\n")
    done = subprocess.run(["bash", str(program)], env={"HOME": "/h", **variables}, capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def test_options_when_full_of_quotes_then_reach_the_trainer_unchanged(tmp_path: Path) -> None:
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


def test_config_when_the_submission_names_another_then_that_one_is_used(tmp_path: Path) -> None:
    text = script("generic", "pbs", words=["--config", "a.toml", "--max_train_steps", "3"])
    assert options_in(text, tmp_path)[:2] == ["--config", "a.toml"]
    assert options_in(text, tmp_path, CONFIG="my b.toml")[:2] == ["--config", "my b.toml"]
    awkward = script("generic", "pbs", words=["--config", "a$b.toml"])
    assert options_in(awkward, tmp_path)[:2] == ["--config", "a$b.toml"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ScriptSettings("1 x", 1, 60), "--name '1 x': must be a letter"),
        (ScriptSettings("x", 1, 60, account="a b"), "--account 'a b': must be one word"),
        (ScriptSettings("x", 1, 60, queue="q\n#PBS -A x"), "--queue .* must be one word"),
        (ScriptSettings("x", 1, 60, setup=("a\nb",)), "--setup: give each line"),
    ],
)
def test_settings_when_a_scheduler_would_misread_them_then_are_refused(settings: ScriptSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        script("generic", "pbs", settings)


def test_script_when_the_site_is_the_users_file_then_holds_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    tables = ['container = "apptainer exec x.sif"', "[environment]", 'A = "b c"', "[slurm]"]
    path.write_text("\n".join([*tables, 'directives = ["--nodes={nodes} --mem=0"]']))
    text = script(str(path), "slurm")
    assert "\n#SBATCH --nodes=4 --mem=0\n" in text
    assert '\n  export A="b c"\n' in text
    assert '--container "apptainer exec x.sif"' in text


def test_submission_when_the_scheduler_takes_the_script_then_its_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    qsub = tmp_path / "bin" / "qsub"
    qsub.parent.mkdir()
    qsub.write_text("#!/bin/sh\necho $1 > submitted\n")
    qsub.chmod(0o755)
    monkeypatch.setenv("PATH", str(qsub.parent))
    submit_job_script("pbs", "mine", "text")
    assert (tmp_path / "submitted").read_text() == "mine.pbs\n"
    assert (tmp_path / "mine.pbs").read_text() == "text"
    with pytest.raises(UserError, match=r"mine\.pbs already exists"):
        submit_job_script("pbs", "mine", "another text")
    with pytest.raises(UserError, match=r"there is no sbatch here; the script is in mine\.sbatch"):
        submit_job_script("slurm", "mine", "text")
