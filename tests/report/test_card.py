"""The model card: metadata that the Hub accepts, and no fact that was not passed in."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from llm.report.card import RunFacts, is_hub_id, model_card

MINIMAL = RunFacts(
    name="demo",
    command="python -m llm.trainers.gpt --output_dir runs/demo --hub_token ***",
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    num_parameters=1_000_000,
    data_name="builtin:python",
    data_hash="abc123",
    num_steps=500,
    num_tokens=2_000_000,
)
COMPLETE = replace(
    MINIMAL,
    base_model="openai-community/gpt2",
    hub_dataset="Salesforce/wikitext",
    tokenizer="train:bpe",
    vocab_size=1024,
    block_size=128,
    train_loss=2.1,
    eval_loss=2.25,
    perplexity=9.4877,
    bits_per_byte=1.62,
    num_eval_tokens=54321,
    train_seconds=3725.4,
    hardware="1 x CPU",
    hyperparameters={"learning_rate": 4e-3, "optim": "adamw"},
    versions={"torch": "2.13.0"},
)


def metadata(card: str) -> dict[str, object]:
    values = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(values, dict)
    return values


def test_card_when_all_facts_are_given_then_has_metadata_that_the_hub_reads() -> None:
    card = ModelCard(model_card(COMPLETE))
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model == "openai-community/gpt2"
    assert card.data.datasets == ["Salesforce/wikitext"]
    assert set(card.data.tags) == {"llm-trainers", "gpt2"}
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"loss": 2.25, "perplexity": 9.4877, "bits_per_byte": 1.62}


def test_card_when_all_facts_are_given_then_states_all() -> None:
    card = model_card(COMPLETE)
    for text in ("54,321 tokens", "2.2500", "2,000,000", "1:02:05", "1 x CPU", "`0.004`", "2.13.0"):
        assert text in card
    assert "```bash\npython -m llm.trainers.gpt --output_dir runs/demo --hub_token ***\n```" in card
    assert "`abc123`" in card
    assert "[openai-community/gpt2](https://huggingface.co/openai-community/gpt2)" in card


def test_card_when_few_facts_are_given_then_states_nothing_else() -> None:
    card = model_card(MINIMAL)
    assert set(metadata(card)) == {"library_name", "pipeline_tag", "tags"}
    assert "trained from scratch" in card
    assert "not evaluated" in card
    for text in (
        "None",
        "Versions",
        "Hyperparameters",
        "fine-tuned",
        "hardware",
        "duration",
        "license",
    ):
        assert text not in card


def test_card_when_the_loss_is_not_finite_then_leaves_it_out() -> None:
    card = model_card(replace(COMPLETE, eval_loss=float("nan"), perplexity=float("inf"), bits_per_byte=None))
    assert "model-index" not in metadata(card)


def test_card_when_the_base_model_is_a_folder_then_names_it_without_a_hub_link(tmp_path: Path) -> None:
    card = model_card(replace(COMPLETE, base_model=str(tmp_path)))
    assert "base_model" not in metadata(card)
    assert f"fine-tuned from `{tmp_path}`" in card


def test_card_when_the_command_has_backticks_and_bars_then_escapes_them() -> None:
    facts = replace(MINIMAL, command="x --sample_prompt '```'", hyperparameters={"prompt": "a|b\nc"})
    card = model_card(facts)
    assert "````bash\nx --sample_prompt '```'\n````" in card
    assert "| `prompt` | `a\\|b c` |" in card


def test_card_when_its_example_is_run_then_loads_the_model(
    tiny_gpt2_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r"```python\n(.*?)```", model_card(MINIMAL, repo_id=str(tiny_gpt2_dir)), re.DOTALL)
    assert code is not None
    exec(code[1].replace("max_new_tokens=100", "max_new_tokens=3"), {})  # noqa: S102
    assert capsys.readouterr().out.startswith("Once upon a time")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", True),
        ("me/my-gpt.v1", True),
        ("builtin:python", False),
        ("/data/x", False),
        ("a/b/c", False),
    ],
)
def test_is_hub_id_when_name_is_a_path_or_malformed_then_false(
    name: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name) is expected
    (tmp_path / "gpt2").mkdir()
    assert not is_hub_id("gpt2")
