"""Whether the Hub can be reached: one probe at the start of a program, and offline mode where it fails.

Without a network, each `from_pretrained` or `load_dataset` retries for half a minute before it reads the local cache.
One short probe, and offline mode for every library where it fails, costs seconds in all.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

# Values before go_offline() changed them, so that come_online() can undo exactly that.
_constants_before: dict[tuple[str, str], object] = {}  # (module, attribute): old value
_variable_before: list[str | None] = []

_OFFLINE_CONSTANTS = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"),
)


def names_on_hub(names: Iterable[str | None]) -> list[str]:
    """Return the names of models, tokenizers or datasets that only the Hub (or its cache) can resolve, in their order.

    The result leaves out None, the empty name, existing files and folders, and names with a colon, such as
    `builtin:python`: the Hub allows no colon in a name.
    """
    return [name for name in names if name and ":" not in name and not Path(name).expanduser().exists()]


def detect(
    names: Sequence[str],
    *,
    push: bool = False,
    run_on_main: Callable[[Callable[[], bool]], bool] = lambda probe: probe(),
) -> bool:
    """Probe the Hub once and return whether it answered; without an answer, or a need for one, go offline.

    Args:
        names: names that the Hub or its cache must resolve (see `names_on_hub`); without any, and without `push`,
            the Hub is not probed.
        push: whether the program will upload to the Hub.
        run_on_main: runs a function on rank 0 and returns its result on every rank; by default it runs here.
    """
    is_reachable = run_on_main(lambda: (bool(names) or push) and hub_is_reachable())
    if not is_reachable:
        go_offline()
    return is_reachable


def unreachable_line(names: Sequence[str]) -> str:
    """Return the line that reports an unreachable Hub and the names that must be in its local cache now."""
    return f"the Hub cannot be reached: {' and '.join(names)} must be on this machine"


def hub_is_reachable(timeout_seconds: float = 3.0) -> bool:
    """Whether the Hub (HF_ENDPOINT, through the user's proxies) answers one request within this time.

    Every answer that is not a server error counts: a mirror may refuse its front page. Without a request, the result
    is False if the user has set HF_HUB_OFFLINE or `go_offline` was called. The function never raises.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return False
    results: list[bool] = []

    def probe() -> None:
        try:
            # The library's session applies the user's proxies and certificates.
            response = get_session().head(constants.ENDPOINT, timeout=timeout_seconds)
            results.append(response.status_code < 500)
        except Exception as error:  # whatever the error is, the Hub cannot be used
            log.debug("no answer from %s: %s", constants.ENDPOINT, error)

    # The client's timeout does not apply to name resolution: the thread bounds the time.
    thread = threading.Thread(target=probe, name="hub-probe", daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return results == [True]


def go_offline() -> None:
    """Make the HuggingFace libraries, whether imported already or later, use their local caches only.

    The environment variable is for libraries that are imported later and for child processes. Imported libraries read
    their constants at every request (transformers reads the one of huggingface_hub).
    """
    import huggingface_hub.constants  # noqa: F401  (its constant must exist to be set)

    if not _variable_before:
        _variable_before.append(os.environ.get("HF_HUB_OFFLINE"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    for module_name, attribute in _OFFLINE_CONSTANTS:
        module = sys.modules.get(module_name)
        if module is not None and not getattr(module, attribute, True):
            _constants_before[module_name, attribute] = getattr(module, attribute)
            setattr(module, attribute, True)


def come_online() -> None:
    """Undo `go_offline`, for another attempt at the end of a run; an HF_HUB_OFFLINE of the user stays.

    A library that was imported in between has read the variable and stays offline, except huggingface_hub.
    """
    for value in _variable_before:
        if value is None:
            os.environ.pop("HF_HUB_OFFLINE", None)
        else:
            os.environ["HF_HUB_OFFLINE"] = value
    for (module_name, attribute), constant in _constants_before.items():
        setattr(sys.modules[module_name], attribute, constant)
    _variable_before.clear()
    _constants_before.clear()
