"""Names of models and tokenizers: what went wrong with one, and which one was probably meant."""

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

# Causal language models that people start from; only suggestions, any other name works too.
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
    """Names of the models that the local Hub cache holds, sorted."""
    try:
        cache = huggingface_hub.scan_cache_dir()
    except (CacheNotFound, ValueError, OSError):
        return []
    return sorted(repo.repo_id for repo in cache.repos if repo.repo_type == "model")


def nearest(name: str, known: Iterable[str], num: int = 3) -> list[str]:
    """The known names most like `name`, best first; case does not matter, nor a missing owner."""
    spelled: dict[str, str] = {}
    for full in known:
        spelled.setdefault(full.lower(), full)
        spelled.setdefault(full.lower().rsplit("/", 1)[-1], full)
    wanted = name.lower()
    close = difflib.get_close_matches(wanted, spelled, n=2 * num, cutoff=0.6)
    close += difflib.get_close_matches(wanted.rsplit("/", 1)[-1], spelled, n=2 * num, cutoff=0.6)
    return list(dict.fromkeys(spelled[match] for match in close))[:num]


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean a, b or c?`, or nothing when no known name is near."""
    names = nearest(name, known)
    if not names:
        return ""
    joined = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    return f"; did you mean {joined}?"


def name_error(flag: str, name: str, missing: str, error: BaseException) -> UserError:
    """One line for a name that could not be loaded.

    Args:
        flag: the option that gave the name, such as ``--tokenizer_name``.
        name: a Hub name or a folder.
        missing: what was looked for, such as ``config.json``.
        error: what the library raised; its causes tell an unknown name from a missing network.
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
            f"{flag} {name}: access to this model must be granted first: ask for it on its page, then give HF_TOKEN"
        )
    if _is_any(causes, RepositoryNotFoundError):
        return UserError(
            f"{flag} {name}: no such folder here and no such model on the Hub (a private one needs HF_TOKEN){hint}"
        )
    if _is_any(causes, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        return UserError(
            f"{flag} {name}: no such folder here, the Hub cannot be reached, and {missing} of "
            f"this name is not in the cache "
            f"({huggingface_hub.constants.HF_HUB_CACHE}): connect, or give a folder{hint}"
        )
    if _is_any(causes, EntryNotFoundError):
        return UserError(f"{flag} {name}: this repository on the Hub has no {missing}{hint}")
    return UserError(f"{flag} {name}: {first_line(error)}{hint}")


def _folder_error(flag: str, name: str) -> UserError:
    path = Path(name).expanduser()
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    inside = sorted(entry.name for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, inside, n=1, cutoff=0.6)
    hint = f"; did you mean {parent / near[0]}?" if near else ""
    return UserError(f"{flag} {name}: no such folder{hint}")


def _looks_like_folder(name: str) -> bool:
    """Whether a folder was meant: `./x`, `/x`, `~/x`, or `x/y` where the folder x exists."""
    return name.startswith((".", "/", "~")) or (os.sep in name and Path(name).parent.is_dir())


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _is_any(causes: list[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(cause, kinds) for cause in causes)
