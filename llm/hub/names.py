"""Errors for names of models and tokenizers that cannot be loaded, with the names that were probably meant."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    CacheNotFound,
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from llm.config.errors import UserError, first_line

# Causal language models that are often fine-tuned. They serve as suggestions only: any other name works, too.
WELL_KNOWN = (
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "distilgpt2",
    "openai-community/gpt2",
    "EleutherAI/gpt-neo-125m",
    "EleutherAI/gpt-neo-1.3B",
    "EleutherAI/gpt-j-6b",
    "EleutherAI/pythia-14m",
    "EleutherAI/pythia-70m",
    "EleutherAI/pythia-160m",
    "EleutherAI/pythia-410m",
    "EleutherAI/pythia-1b",
    "facebook/opt-125m",
    "facebook/opt-350m",
    "facebook/opt-1.3b",
    "bigscience/bloom-560m",
    "roneneldan/TinyStories-33M",
    "HuggingFaceTB/SmolLM2-135M",
    "HuggingFaceTB/SmolLM2-360M",
    "Qwen/Qwen3-0.6B",
    "TinyLlama/TinyLlama_v1.1",
    "meta-llama/Llama-3.2-1B",
    "google/gemma-3-270m",
)


def cached_model_names() -> list[str]:
    """Return the names of the models in the local Hub cache, sorted."""
    try:
        cache = huggingface_hub.scan_cache_dir()
    except (CacheNotFound, ValueError, OSError):
        return []
    return sorted(repo.repo_id for repo in cache.repos if repo.repo_type == "model")


def nearest(name: str, known: Iterable[str], num: int = 3) -> list[str]:
    """Return up to `num` known names that are most similar to `name`, best first; ignores case and a missing owner."""
    full_names: dict[str, str] = {}  # by lower-case name, with and without the owner
    for full_name in known:
        full_names.setdefault(full_name.lower(), full_name)
        full_names.setdefault(full_name.lower().rsplit("/", 1)[-1], full_name)
    lower_name = name.lower()
    matches = difflib.get_close_matches(lower_name, full_names, n=2 * num, cutoff=0.6)
    matches += difflib.get_close_matches(lower_name.rsplit("/", 1)[-1], full_names, n=2 * num, cutoff=0.6)
    return list(dict.fromkeys(full_names[match] for match in matches))[:num]


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean a, b or c?` with similar known names, or an empty string if no known name is similar."""
    names = nearest(name, known)
    if not names:
        return ""
    joined = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    return f"; did you mean {joined}?"


def name_error(flag: str, name: str, missing: str, error: BaseException) -> UserError:
    """Return an error of one line for a name that could not be loaded.

    Args:
        flag: the option that contains the name, such as ``--tokenizer_name``.
        name: a Hub name or a folder.
        missing: the file or object that could not be loaded, such as ``config.json``.
        error: the library's error; its causes distinguish an unknown name from a missing network.
    """
    if Path(name).expanduser().exists():
        return UserError(f"{flag} {name}: no readable {missing} in this folder: {first_line(error)}")
    causes = _causes(error)
    if _is_any(causes, HFValidationError) or _looks_like_folder(name):
        return _folder_error(flag, name)
    known = sorted({*WELL_KNOWN, *cached_model_names()})
    hint = "" if name in known else suggestion(name, known)
    if _is_any(causes, GatedRepoError):
        return UserError(
            f"{flag} {name}: access to this model must be granted first: request it on the model's page, "
            "then set HF_TOKEN"
        )
    if _is_any(causes, RepositoryNotFoundError):
        return UserError(
            f"{flag} {name}: no such folder here and no such model on the Hub (a private one needs HF_TOKEN){hint}"
        )
    if _is_any(causes, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        return UserError(
            f"{flag} {name}: no such folder here, the Hub cannot be reached, and {missing} of "
            f"this name is not in the cache "
            f"({huggingface_hub.constants.HF_HUB_CACHE}): connect to the network, or give a folder{hint}"
        )
    if _is_any(causes, EntryNotFoundError):
        return UserError(f"{flag} {name}: this repository on the Hub has no {missing}{hint}")
    return UserError(f"{flag} {name}: {first_line(error)}{hint}")


def _folder_error(flag: str, name: str) -> UserError:
    path = Path(name).expanduser()
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    siblings = sorted(entry.name for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
    matches = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.6)
    hint = f"; did you mean {parent / matches[0]}?" if matches else ""
    return UserError(f"{flag} {name}: no such folder{hint}")


def _looks_like_folder(name: str) -> bool:
    """Whether a name means a folder: `./x`, `/x`, `~/x`, or `x/y` if the folder x exists."""
    return name.startswith((".", "/", "~")) or (os.sep in name and Path(name).parent.is_dir())


def _causes(error: BaseException) -> list[BaseException]:
    """Return the error and the chain of errors that caused it."""
    causes: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in causes:
        causes.append(current)
        current = current.__cause__ or current.__context__
    return causes


def _is_any(causes: list[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(cause, kinds) for cause in causes)
