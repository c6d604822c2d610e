"""Whether there is a model of that name: a hub is asked once and in silence, before libraries that would ask
for minutes and tell of every try.
"""

from __future__ import annotations

from pathlib import Path

from precompute.engines.checks import missing_directory
from store.errors import EngineError


def check_there(model: str, revision: str | None, *, named: str) -> None:
    """Raises EngineError, one line that begins with `named`, when there is no such model, or nobody to ask.

    For what was downloaded before, too, libraries ask a hub: where none can be reached, they have to be told
    not to. A hub that answers neither yes nor no is left to whoever loads.
    """
    reason = why_not_there(model, revision)
    if reason is not None:
        raise EngineError(f"{named}: {reason}")


def why_not_there(model: str, revision: str | None) -> str | None:
    """Why there is no such model, and the way out; None: nothing speaks against it."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(model).is_dir():
        return None
    if missing := missing_directory(model):
        return missing
    try:
        downloaded = isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str)
    except HFValidationError:
        return "it is neither a directory nor a name that a hub could have (OWNER/NAME)"
    if not constants.is_offline_mode():
        return _of_the_hub(model, revision, constants.ENDPOINT, downloaded=downloaded)
    return (
        None if downloaded else f"{_absent(model)}, and HF_HUB_OFFLINE is set: download it first, without it"
    )


def _absent(model: str) -> str:
    return f"there is no such directory, it was not downloaded before (`hf download {model}`)"


def _of_the_hub(model: str, revision: str | None, hub: str, *, downloaded: bool) -> str | None:
    """What speaks against the model after the hub was asked; None: nothing."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    # Of whichever client the hub's library speaks with.
    from huggingface_hub.errors import HTTPError as SpokenError  # type: ignore[attr-defined]

    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json", revision=revision))
    except HfHubHTTPError as error:
        return None if downloaded else _refusal(error, model, revision, hub)
    except SpokenError as error:
        silence = f"{hub} cannot be reached ({' '.join(str(error).split()) or type(error).__name__})"
        if downloaded:
            return f"{silence}: set HF_HUB_OFFLINE=1 to take it as it was downloaded"
        return (
            f"{_absent(model)}, and {silence}: download it first where there is a network, then set "
            "HF_HUB_OFFLINE=1"
        )
    return None


def _refusal(error: OSError, model: str, revision: str | None, hub: str) -> str | None:
    """Of an answer by the hub; None: it says nothing of the model."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return f"it is gated: accept its terms at {hub}/{model}, then `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r} at {hub}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no such directory, and no such model at {hub}: is the name right? "
            "(a private one needs `hf auth login`)"
        )
    return None
