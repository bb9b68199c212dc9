"""Abbreviated options such as `--train`, and the closest name to a misspelt one.

Command lines that worked with HuggingFace's `run_clm_no_trainer.py` or with llm-pytorch's
`llm.trainers.gpt` must keep their meaning, abbreviations included: argparse accepts every prefix
that is unique. A word is therefore resolved in this order:

1. a complete name;
2. a prefix that is unique among the options of either program, so that no option added here can change the
   meaning of an abbreviation (a prefix that is unique in both programs means the same option in both);
3. a prefix that is unique among the options of the command.

`--config FILE` is the one exception: in those programs it abbreviates `--config_name`, here it is a
complete name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

# The options of every command in addition to its table.
BUILT_IN = ("config", "help", "version")

RUN_CLM = frozenset(
    """
    help dataset_name dataset_config_name train_file validation_file validation_split_percentage
    model_name_or_path config_name tokenizer_name use_slow_tokenizer per_device_train_batch_size
    per_device_eval_batch_size learning_rate weight_decay num_train_epochs max_train_steps
    gradient_accumulation_steps lr_scheduler_type num_warmup_steps output_dir seed model_type
    block_size preprocessing_num_workers overwrite_cache no_keep_linebreaks push_to_hub hub_model_id
    hub_token trust_remote_code checkpointing_steps resume_from_checkpoint with_tracking report_to
    low_cpu_mem_usage
    """.split()
)
LLM_PYTORCH = frozenset(
    """
    help dataset_name dataset_config_name train_file validation_file validation_split_percentage
    model_name_or_path config_name tokenizer_name use_slow_tokenizer per_device_train_batch_size
    per_device_eval_batch_size mixed_precision learning_rate weight_decay num_train_epochs
    max_train_steps gradient_accumulation_steps lr_scheduler_type num_warmup_steps output_dir seed
    model_type block_size preprocessing_num_workers overwrite_cache no_keep_linebreaks
    checkpointing_steps resume_from_checkpoint low_cpu_mem_usage kfac kfac_factor_update_steps
    kfac_inv_update_steps kfac_damping kfac_factor_decay kfac_kl_clip
    """.split()
)


def resolve(word: str, names: Collection[str]) -> list[str]:
    """Return the options that a flag may mean: one if it is clear, several if ambiguous, none if unknown.

    Args:
        word: the flag as written, without its leading dashes and its `=value`; dashes inside count as underscores.
        names: the options of the table and `BUILT_IN`.
    """
    word = word.replace("-", "_")
    if word in names:
        return [word]
    if not word:
        return []
    for program in (RUN_CLM, LLM_PYTORCH):
        matches = _starting_with(word, program)
        if len(matches) == 1 and matches[0] in names:
            return matches
    return _starting_with(word, names)


def closest_match(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the name that is most similar to a word; None if no similarity reaches the cutoff (0 to 1)."""
    import difflib

    by_lower_case = {name.lower(): name for name in names}
    matches = difflib.get_close_matches(word.lower().replace("-", "_"), by_lower_case, n=1, cutoff=cutoff)
    return by_lower_case[matches[0]] if matches else None


def _starting_with(word: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(word))
