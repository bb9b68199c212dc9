"""``python -m llm.runs`` on the folders of real runs: its lists are right, and its command resumes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm.files.manifest import write_manifest
from llm.runs import main
from llm.trainers.gpt import main as train
from llm.training.run_dir.inspect import read_run, resume_command

NO_PROCESS = 2**22 + 1  # larger than any process id


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path, tiny_gpt2_dir: Path) -> Path:
    """A run of 6 steps with checkpoints 2, 4 and 6, started as `runs/done` in its own folder."""
    home = tmp_path_factory.mktemp("home")
    (home / "my.txt").write_text(tiny_text.read_text()[:20_000])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        words = f"--train_file my.txt --tokenizer_name {tiny_gpt2_dir} --config_name {tiny_gpt2_dir} --dropout 0"
        words += (
            " --block_size 32 --use_cpu --max_train_steps 6 --checkpointing_steps 2 --eval_steps 3 --logging_steps 1"
        )
        assert train([*words.split(), "--output_dir", "runs/done"]) == 0
    return home / "runs" / "done"


@pytest.fixture
def home(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder where the run was started; it is the current folder."""
    shutil.copytree(finished.parents[1], tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def killed(home: Path) -> Path:
    """The run as a kill after step 5 leaves it: the status is running, and no process holds the lock."""
    run = Path("runs/done")
    shutil.rmtree(run / "checkpoints" / "step_6")
    (run / "model.safetensors").unlink()
    (run / "status.json").write_text(json.dumps({"state": "running", "pid": NO_PROCESS}))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 5]
    (run / "metrics.jsonl").write_text("".join(kept) + '{"step": 6, "lo')
    hold(run, NO_PROCESS)
    return run


def hold(run: Path, pid: int) -> None:
    (run / "run.lock").write_text(json.dumps({"host": socket.gethostname(), "pid": pid}))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rows_of(out: str) -> dict[int, list[str]]:
    """Rows of the table by step, split into columns."""
    rows = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    return {int(row[0]): row[1:] for row in rows if row[0].isdigit()}


def test_run_when_done_then_lists_its_checkpoints_and_their_reasons(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs/done"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("runs/done: done after step 6 (exit code 0); 6 steps in total\n")
    rows = rows_of(out)
    assert list(rows) == [2, 4, 6]  # the checkpoint of the evaluation at 3 was removed: 6 is better
    reasons, loss, eval_loss, size, age, marks = rows[6]
    assert set(reasons.split("+")) >= {"regular", "end"}
    records = [json.loads(line) for line in Path("runs/done/metrics.jsonl").read_text().splitlines()]
    assert loss == f"{next(r['loss'] for r in records if r['step'] == 6 and 'loss' in r):.3f}"
    assert eval_loss == f"{next(r['eval_loss'] for r in records if r['step'] == 6 and 'eval_loss' in r):.3f}"
    assert re.fullmatch(r"[\d.]+ KiB", size)
    assert re.fullmatch(r"\d+ (s|min)", age)
    assert marks == "good, newest, best"
    assert rows[2][2] == "-"
    assert "nothing is left to resume" in out
    assert "--verify reads every byte" in out


def test_run_when_killed_then_is_listed_as_killed_and_the_command_resumes_it(
    killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(killed)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{killed}: killed after step 5: status.json says running, but no process holds the folder")
    (command,) = re.findall(r"^  resume: (.*)$", out, re.MULTILINE)
    assert command == "python -m llm.trainers.gpt --config runs/done/config.toml --resume_from_checkpoint"
    resumed = run_in_shell(command, killed)
    assert "resumed from step 4" in resumed
    assert "done: runs/done" in resumed


def test_command_when_listed_from_another_folder_then_changes_to_where_the_run_was_started(
    killed: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["home/runs/done"])
    (command,) = re.findall(r"^  resume: (.*)$", capsys.readouterr().out, re.MULTILINE)
    there, _, rest = command.partition(" && ")
    assert there == f"cd {home}"
    monkeypatch.chdir(home)
    assert train(shlex.split(rest)[3:]) == 0
    assert "resumed from step 4" in capsys.readouterr().out


def test_command_when_the_run_was_moved_then_names_its_new_folder(
    killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = killed.rename("moved here")
    command = resume_command(read_run(moved, verify=False))
    assert command is not None
    assert "--config 'moved here/config.toml' --output_dir 'moved here' --resume_from_checkpoint" in command
    assert train(shlex.split(command)[3:]) == 0
    assert "resumed from step 4" in capsys.readouterr().out
    assert not killed.exists()


def run_in_shell(command: str, run: Path) -> str:
    """Run a shell command with this interpreter and return its output."""
    program, rest = command.split(" ", 1)
    programs = {"python": "", "torchrun": " -m torch.distributed.run --standalone"}
    command = f"{sys.executable}{programs[program]} {rest}"
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        ["sh", "-c", command],
        env={**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    return done.stdout


@pytest.mark.slow
def test_command_when_the_run_had_two_processes_then_starts_two(killed: Path) -> None:
    state_path = killed / "checkpoints" / "step_4" / "training_state.json"
    state = json.loads(state_path.read_text())
    state["world"] = {"num_processes": 2, "num_nodes": 1}
    state_path.write_text(json.dumps(state))
    write_manifest(state_path.parent)
    config = killed / "config.toml"
    config.write_text(config.read_text().replace("per_device_train_batch_size = 8", "per_device_train_batch_size = 4"))
    command = resume_command(read_run(killed, verify=False))
    assert command is not None
    assert command.startswith("torchrun --nproc_per_node 2 -m llm.trainers.gpt --config ")
    assert "2 processes" in run_in_shell(command, killed)


def test_command_when_the_run_had_two_nodes_then_starts_its_processes_on_each(
    killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state_path = killed / "checkpoints" / "step_4" / "training_state.json"
    state = json.loads(state_path.read_text())
    assert state["world"] == {"num_processes": 1, "num_nodes": 1}
    state["world"] = {"num_processes": 8, "num_nodes": 2}
    state_path.write_text(json.dumps(state))
    write_manifest(state_path.parent)
    assert main([str(killed)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "resume" in line]
    text, _, command = line.partition(": ")
    assert text == "  resume on each of 2 nodes, with the name of one of them as FIRST_NODE"
    words = shlex.split(command)
    assert words[:5] == ["torchrun", "--nnodes", "2", "--rdzv_backend", "c10d"]
    assert words[words.index("--rdzv_endpoint") + 1] == "FIRST_NODE:29400"
    assert words[words.index("--nproc_per_node") + 1] == "4"


@pytest.mark.slow
def test_command_when_run_on_two_nodes_then_resumes_the_run(killed: Path, tiny_text: Path) -> None:
    """Two torchruns on this machine, which the run takes for two nodes: each has a process of local rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    state_path = killed / "checkpoints" / "step_4" / "training_state.json"
    state = json.loads(state_path.read_text())
    state["world"] = {"num_processes": 2, "num_nodes": 2}
    state_path.write_text(json.dumps(state))
    write_manifest(state_path.parent)
    config = killed / "config.toml"
    config.write_text(config.read_text().replace("per_device_train_batch_size = 8", "per_device_train_batch_size = 4"))
    command = resume_command(read_run(killed, verify=False))
    assert command is not None
    words = shlex.split(command.replace("FIRST_NODE:29400", f"127.0.0.1:{port}"))
    root = str(Path(__file__).parents[1])
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--local_addr", "127.0.0.1", *words[1:]],
            env={**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    outs = [node.communicate(timeout=150)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    assert "resumed from step 4" in "".join(outs)
    assert json.loads((killed / "status.json").read_text())["state"] == "done"
    run = read_run(killed, verify=False)
    assert (run.num_nodes, run.num_processes) == (2, 1)


def test_run_when_a_process_holds_it_then_names_the_process(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hold(killed, os.getppid())
    main([str(killed)])
    out = capsys.readouterr().out
    assert out.startswith(f"{killed}: running, process {os.getppid()} on {socket.gethostname()} after step 5")
    assert "resume:" not in out
    status = {"state": "failed", "reason": "UserError: no\nmemory", "exit_code": 1}
    (killed / "status.json").write_text(json.dumps(status))
    main([str(killed)])
    assert "before that failed after step 5: UserError: no memory (exit code 1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (
            {"state": "stopped", "step": 4, "reason": "SIGTERM", "exit_code": 75},
            "stopped after step 4: SIGTERM (exit code 75)",
        ),
        (
            {"state": "failed", "reason": "UserError: x", "exit_code": 1},
            "failed after step 5: UserError: x (exit code 1)",
        ),
        (None, "no status.json can be read"),
    ],
    ids=["stopped", "failed", "torn"],
)
def test_run_when_it_ended_then_is_listed_with_the_reason(
    status: dict[str, Any] | None, expected: str, killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (killed / "status.json").write_text(json.dumps(status) if status else '{"state": ')
    assert main([str(killed)]) == 0
    assert expected in capsys.readouterr().out


def test_damage_when_bytes_have_changed_then_only_verify_finds_it(
    killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(killed / "checkpoints" / "step_4" / "model.safetensors")
    assert main([str(killed)]) == 0
    assert rows_of(capsys.readouterr().out)[4][-1] == "good, newest"
    assert main([str(killed), "--verify"]) == 1
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert rows[4][-1] == "damaged: model.safetensors has other content than when it was written"
    assert rows[2][-1] == "good, newest"
    assert "good: every byte was read" in out


def test_damage_when_a_file_is_missing_or_has_another_size_then_is_listed_without_verify(
    killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (killed / "checkpoints" / "step_4" / "optimizer.safetensors").unlink()
    (killed / "checkpoints" / "step_2" / "training_state.json").write_text("{")
    assert main([str(killed)]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows[4][-1] == "damaged: optimizer.safetensors is missing"
    assert rows[2][-1].startswith("damaged: training_state.json has 1 bytes instead of")
    flip(killed / "checkpoints" / "step_2" / "manifest.json")
    assert main([str(killed)]) == 0
    assert rows_of(capsys.readouterr().out)[2][-1].startswith("damaged: manifest.json ")


def test_abandoned_checkpoints_when_they_exist_then_are_mentioned(
    killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (killed / "checkpoints" / "abandoned" / "step_9").mkdir(parents=True)
    main([str(killed)])
    out = capsys.readouterr().out
    assert "runs/done/checkpoints/abandoned holds 1 " in out
    assert "removed by no run" not in out


def test_checkpoint_when_another_program_wrote_it_then_is_not_listed_as_damaged(
    killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    external = killed / "checkpoints" / "step_5"
    external.mkdir()
    (external / "optimizer.bin").touch()
    (killed / "checkpoints" / "epoch_0").mkdir()
    (killed / "checkpoints" / "step_2" / "training_state.json").unlink()
    assert main([str(killed), "--verify"]) == 1  # for step_2
    out = capsys.readouterr().out
    assert rows_of(out)[5][-1].startswith("another program's")
    assert "  damaged or not this run's, and removed by no run: epoch_0, step_2, step_5\n" in out


def test_folder_when_it_holds_runs_then_each_is_one_line(
    killed: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, "runs/b")
    Path("runs/none").mkdir()
    flip(killed / "checkpoints" / "step_4" / "model.safetensors")
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["runs/b", "runs/done"]
    assert re.search(r"3 good +[\d.]+ [KM]iB +newest step 6, .* old +done after step 6", lines[0])
    assert re.search(r"newest step 4, .* old +killed after step 5", lines[1])
    assert main(["runs", "--verify"]) == 1
    assert "1 good, 1 damaged" in capsys.readouterr().out


def test_runs_when_none_is_named_then_lists_those_in_the_current_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir("runs")
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("done  3 good ")


def test_runs_when_several_are_named_then_all_are_listed_and_a_wrong_one_is_one_line(
    home: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs/done", "nowhere", str(finished)]) == 1
    out, err = capsys.readouterr()
    assert out.count("done after step 6") == 2
    assert err == "error: nowhere: not a run and holds none; give a run's --output_dir, or a folder of runs\n"


def test_runs_when_an_option_is_misspelt_then_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--verfy"]) == 2
    assert "--verify" in capsys.readouterr().err


def test_runs_when_started_then_torch_is_not_imported_and_it_takes_under_half_a_second(home: Path) -> None:
    code = (
        "import sys, time; from llm.runs import main; code = main(['runs/done']); used = time.process_time();"
        "print(code, used, *({'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules)), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    code_, used, *heavy = done.stderr.split()
    assert (code_, heavy) == ("0", [])
    assert float(used) < 0.5
