"""Whether there is a model of that name: a hub is asked once and in silence, before libraries that would ask
for a minute and tell of every try.
"""

from __future__ import annotations

from pathlib import Path

from precompute.engines.checks import missing_directory
from store.errors import EngineError


def check_there(model: str, revision: str | None, *, named: str) -> None:
    """Raises EngineError, one line that begins with `named`, when there is no such model.

    A directory, or what was downloaded before, is there without anybody being asked. A hub that answers
    neither yes nor no is left to whoever loads.
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
        if isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
            return None
    except HFValidationError:
        return "it is neither a directory nor a name that a hub could have (OWNER/NAME)"
    absent = f"there is no such directory, it was not downloaded before (`hf download {model}`), and "
    if constants.is_offline_mode():
        return absent + "HF_HUB_OFFLINE is set: download it first, without it"
    return _of_the_hub(model, revision, constants.ENDPOINT, absent)


def _of_the_hub(model: str, revision: str | None, hub: str, absent: str) -> str | None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Of whichever client the hub's library speaks with.
    from huggingface_hub.errors import HTTPError as SpokenError  # type: ignore[attr-defined]

    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json", revision=revision))
    except GatedRepoError:
        return f"it is gated: accept its terms at {hub}/{model}, then `hf auth login`"
    except RevisionNotFoundError:
        return f"it has no revision {revision!r} at {hub}"
    except RepositoryNotFoundError:
        return (
            f"there is no such directory, and no such model at {hub}: is the name right? "
            "(a private one needs `hf auth login`)"
        )
    except HfHubHTTPError:
        return None
    except SpokenError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return (
            f"{absent}{hub} cannot be reached ({reason}): download it first where there is a network, then "
            "set HF_HUB_OFFLINE=1"
        )
    return None
