"""Text from outside, made safe to print: one line, not too long, no access tokens."""

import re


TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}\b")


def one_line(text: object) -> str:
    """The text without line breaks, control characters and marks that turn the direction of writing."""
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable())


def elided(text: str, length: int) -> str:
    """The text without its middle, where it is longer than `length` characters."""
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 + 5 :]}"


def shortened(text: object) -> str:
    """The text in one line that is not too long for a message."""
    return one_line(text)[:300]


def redacted(text: str, *, token: str | None = None) -> str:
    """The text with every access token replaced: any of the Hub's form, the one in use, and `token`."""
    from huggingface_hub import get_token  # only text that leaves the process needs it

    for secret in (token, get_token()):
        if secret:
            text = text.replace(secret, "<token>")
    return TOKEN.sub("<token>", text)
