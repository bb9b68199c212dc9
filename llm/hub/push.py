"""Uploads of a finished run to the HuggingFace Hub: the check of access at the start, and the push at the end.

The access token is used in request headers only, and is removed from every message of the library.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

from llm.config.errors import UserError
from llm.hub.connection import come_online, hub_is_reachable

log = logging.getLogger(__name__)

_LOGIN = "set HF_TOKEN, pass --hub_token, or run `hf auth login`"
_TOKENS_PAGE = "https://huggingface.co/settings/tokens"
# The Hub's rule for the name of an owner or a repository: no two of - and . in a row, and none at the ends.
_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")


def check_hub_access(hub_model_id: str | None, output_dir: Path, token: str | None) -> str | None:
    """Check at the start of a run whether `push_folder` can succeed at its end, and create the repository.

    Creating the repository (a no-op if it exists) is the only way to determine whether the token has write permission.

    Args:
        hub_model_id: ``owner/name`` or ``name``; None takes the name of `output_dir`.
        output_dir: the run's folder.
        token: access token; None for HF_TOKEN or the token of ``hf auth login``.

    Returns:
        The full name of the repository, or None if the Hub did not answer (which is logged as a warning).

    Raises:
        UserError: there is no token, the Hub refuses it or it has no write permission, or the name of the repository
            is invalid.
    """
    token = _require_token(token)
    _check_name(_name_of(hub_model_id, output_dir))
    try:
        if not hub_is_reachable():
            raise ConnectionError("no answer")
        repo_id = resolve_repo_id(hub_model_id, output_dir, token)
        HfApi(token=token).create_repo(repo_id, exist_ok=True)
    except UserError:
        raise
    except Exception as error:
        if advice := _advice(error, token):
            raise UserError(f"--push_to_hub: {advice}") from None
        log.warning(
            "the Hub cannot be reached now (%s); the push at the end will be tried anyway",
            _one_line(error, token),
        )
        return None
    return repo_id


def resolve_repo_id(hub_model_id: str | None, output_dir: Path, token: str | None) -> str:
    """Return the full name of the repository, ``owner/name``; request the owner from the Hub if none is given.

    Args:
        hub_model_id: ``owner/name`` or ``name``; None takes the name of `output_dir`.
        output_dir: the run's folder.
        token: access token; None for HF_TOKEN or the token of ``hf auth login``.

    Raises:
        UserError: there is no token, or the name is invalid.
        Exception: any error of huggingface_hub if the request fails.
    """
    name = _name_of(hub_model_id, output_dir)
    _check_name(name)
    if "/" in name:
        return name
    return f"{HfApi(token=_require_token(token)).whoami()['name']}/{name}"


def push_folder(
    folder: Path,
    repo_id: str | None,
    token: str | None,
    *,
    uploaded: Sequence[str],
    excluded: Sequence[str],
    commit_message: str = "Upload the trained model",
) -> str:
    """Upload the finished files of a run's folder in one commit: all of them appear on the Hub, or none.

    Args:
        folder: a run's folder.
        repo_id: ``owner/name``, or ``name`` of a repository of the token's owner; None takes the name of the folder.
        token: access token; None for HF_TOKEN or the token of ``hf auth login``.
        uploaded: fnmatch patterns of the names of the files that are uploaded; subfolders are not.
        excluded: patterns of the run's other files, for the command that repeats the push.
        commit_message: message of the commit on the Hub.

    Returns:
        The URL of the model's page.

    Raises:
        UserError: the push failed; the message names the cause and the command that repeats the push.
    """
    secret = token or ""
    try:
        secret = _require_token(token)
        paths = finished_files(folder, uploaded)
        come_online()  # the network may be back since the start of the run
        if not hub_is_reachable(timeout_seconds=10.0):
            raise UserError(f"no answer from {constants.ENDPOINT}")
        full_name = repo_id = resolve_repo_id(repo_id, folder, secret)
        api = HfApi(token=secret)
        url = str(api.create_repo(full_name, exist_ok=True))
        additions = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in paths]
        api.create_commit(full_name, additions, commit_message=commit_message)
    except Exception as error:
        if isinstance(error, UserError):
            cause = str(error)
        else:
            cause = _advice(error, secret) or _one_line(error, secret)
        raise UserError(
            f"the push to the Hub failed: {cause}; "
            f"the finished folder is kept, push it with: {push_command(folder, repo_id, excluded)}"
        ) from None
    log.info("pushed to %s", url)
    return url


def finished_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files of a run's folder that are uploaded to the Hub, sorted by name.

    Args:
        folder: a run's folder.
        patterns: fnmatch patterns of the names of these files.

    Raises:
        UserError: the folder contains no weights.
    """
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in patterns)
    )
    if not any(path.suffix == ".safetensors" for path in paths):
        raise UserError(f"{folder} contains no weights (model.safetensors)")
    return paths


def push_command(folder: Path, repo_id: str | None, excluded: Sequence[str]) -> str:
    """Return the shell command with which a user uploads the same files.

    Args:
        folder: a run's folder.
        repo_id: ``owner/name`` or ``name``; None takes the name of the folder.
        excluded: patterns of the files that are not uploaded.
    """
    arguments = ["hf", "upload", repo_id or _name_of(None, folder), str(folder), "."]
    for pattern in excluded:
        arguments += ["--exclude", pattern]
    return shlex.join(arguments)


def _name_of(hub_model_id: str | None, output_dir: Path) -> str:
    return hub_model_id or output_dir.resolve().name


def _check_name(name: str) -> None:
    parts = name.split("/")
    is_valid = len(parts) <= 2 and len(name) <= 96 and all(_NAME.fullmatch(part) for part in parts)
    if not is_valid or name.endswith(".git"):
        raise UserError(
            f"{name!r} cannot name a Hub repository (letters and digits, single - _ . between "
            "them, at most 96): give --hub_model_id such as me/my-gpt"
        )


def _require_token(token: str | None) -> str:
    token = token or get_token()
    if not token:
        raise UserError(f"--push_to_hub needs an access token: {_LOGIN}")
    return token


def _advice(error: BaseException, token: str) -> str | None:
    """Return the cause of a refusal by the Hub and its fix; None if the error is a failure and no refusal."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the Hub does not know the access token; {_LOGIN}"
    if status == 403:
        return f"the access token has no write permission there; create one that has it at {_TOKENS_PAGE}"
    if status == 404:
        return "the Hub knows no such repository or owner; check --hub_model_id"
    if status in (408, 429) or not isinstance(status, int) or not 400 <= status < 500:
        return None
    return f"the Hub refused the request: {_one_line(error, token)}"


def _one_line(error: BaseException, token: str) -> str:
    """Return the innermost message of an error on one line, without the token and all texts that look like tokens."""
    while error.__cause__ is not None and not str(error).strip():
        error = error.__cause__
    line = " ".join(str(error).split()) or type(error).__name__
    if token:
        line = line.replace(token, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", "***", line)[:300]
