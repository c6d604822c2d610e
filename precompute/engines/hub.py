"""Asks a hub for a model once and silently, before libraries that ask for minutes and log every try."""

from __future__ import annotations

from pathlib import Path

from precompute.engines.checks import missing_directory
from store.errors import EngineError


def check_there(model: str, revision: str | None, *, named: str) -> None:
    """Raises EngineError, one line that begins with `named`, if there is no such model or no hub to ask.

    Libraries ask a hub for downloaded models, too: without a hub they need HF_HUB_OFFLINE. Unclear answers of
    a hub raise nothing here; loading the model will explain them.
    """
    reason = why_not_there(model, revision)
    if reason is not None:
        raise EngineError(f"{named}: {reason}")


def why_not_there(model: str, revision: str | None) -> str | None:
    """Returns why there is no such model, with the way out; None if there may be."""
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if Path(model).is_dir():
        return None
    if missing := missing_directory(model):
        return missing
    try:
        downloaded = isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str)
    except errors.HFValidationError:
        return "it is neither a directory nor a name that a hub could have (OWNER/NAME)"
    absent = f"there is no such directory, it was not downloaded before (`hf download {model}`)"
    if constants.is_offline_mode():
        return None if downloaded else f"{absent}, and HF_HUB_OFFLINE is set: download it first, without it"
    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json", revision=revision))
    except errors.HfHubHTTPError as error:
        hub = constants.ENDPOINT
        reasons: dict[type[Exception], str] = {
            errors.GatedRepoError: f"it is gated: accept its terms at {hub}/{model}, then `hf auth login`",
            errors.RevisionNotFoundError: f"it has no revision {revision!r} at {hub}",
            errors.RepositoryNotFoundError: f"there is no such directory, and no such model at {hub}: is the "
            "name right? (a private one needs `hf auth login`)",
        }
        return None if downloaded else reasons.get(type(error))
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # of any HTTP client
        reason = " ".join(str(error).split()) or type(error).__name__
        unreachable = f"{constants.ENDPOINT} cannot be reached ({reason})"
        if downloaded:
            return f"{unreachable}: set HF_HUB_OFFLINE=1 to take it as it was downloaded"
        return f"{absent}, and {unreachable}: download it first with a network, then set HF_HUB_OFFLINE=1"
    return None
