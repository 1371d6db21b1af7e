"""What is wrong with a file, in one line."""

from pydantic import ValidationError


def one_line(error: Exception) -> str:
    """An error's message, or its class where it has none; of pydantic's each key, value and reason."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())[:300] or type(error).__name__
    wrong = [(".".join(map(str, e["loc"])), e["input"], e["msg"], e["type"]) for e in error.errors()[:5]]
    return "; ".join(
        f"{key}{'' if kind == 'missing' else f' = {value!r:.60}'}: {text}" for key, value, text, kind in wrong
    )
