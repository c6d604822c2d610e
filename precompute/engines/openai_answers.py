"""Text out of a server's answer, in whichever shape it comes."""

from __future__ import annotations

from typing import Any


def choice_of(answer: Any) -> Any:
    """Returns the choice of an answer. ValueError, with the server's words, where there is none."""
    choices = getattr(answer, "choices", None)
    if isinstance(choices, list) and choices and choices[0] is not None:
        return choices[0]
    said = answer if isinstance(answer, str) else getattr(answer, "error", None)
    said = said.get("message", said) if isinstance(said, dict) else said
    raise ValueError(f"its answer has no completion{f': {said}' if said else ''}")


def chat_text(choice: Any) -> str:
    """Returns a message's text, behind its reasoning in think tags where the server returns that apart."""
    message = getattr(choice, "message", None)
    content = getattr(message, "content", None)
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    if not isinstance(thought, str):
        return whole_text(getattr(message, "refusal", None) if content is None else content)
    if not content and choice.finish_reason != "stop":
        return whole_text(f"<think>\n{thought}")
    return whole_text(behind_thought(content or "", thought))


def behind_thought(text: str, thought: str) -> str:
    """Returns a text behind its reasoning in think tags."""
    return f"<think>\n{thought.strip()}\n</think>\n\n{text}"


def whole_text(text: Any) -> str:
    """Returns the text, with U+FFFD for half a surrogate pair, which no file holds. ValueError for none."""
    if not isinstance(text, str):
        raise ValueError("its completion has no text")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
