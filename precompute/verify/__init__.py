"""The verifier of teacher and student."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from precompute.verify.verifier import Verdict, Verifier, verify_answer

__all__ = ["Verdict", "Verifier", "verify_answer"]


def __getattr__(name: str) -> Any:
    """Imports on demand: a worker that loads `verify.math` must not load what only its parent needs."""
    if name in __all__:
        from precompute.verify import verifier

        return getattr(verifier, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
