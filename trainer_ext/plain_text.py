"""Text that comes from elsewhere, made fit to be shown and kept: nothing in it acts, and no secret is in it.

Names, messages, commands and logs go in; the same text comes out, with control and invisible characters as escapes, with
what HTML and Markdown act on as text, and with tokens and passwords as `***`.
"""

import html
import os
import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "***"
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~:$-])")
SECRET = re.compile(r"(token|password|passwd|secret|(api|access|private)[_-]?key)$", re.IGNORECASE)
IN_A_URL = re.compile(r"(:/{1,2})[^/\s'\"]+(?=@)")  # one slash where a path was made of it
OF_THE_HUB = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
SHORTEST = 8  # of a secret in the environment: a shorter word may stand anywhere


def printable(text: str) -> str:
    """The text with every character escaped that a terminal acts on or does not show; line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def for_pages(value: Any) -> Any:
    """What a template puts in, `printable` where it is text; the template's own escaping comes after it."""
    return printable(value) if type(value) is str else value


def for_markdown(value: Any) -> str:
    """A text that Markdown and HTML show as it is, on one line."""
    return MARKDOWN.sub(r"\\\1", html.escape(printable(" ".join(str(value).split())), quote=False))


def masked(text: str) -> str:
    """The text without user and password of URLs, tokens of the hub, and the secrets of this process's environment.

    A variable holds a secret where its name ends as `HF_TOKEN`, `WANDB_API_KEY` or `PGPASSWORD` do.
    """
    held = {value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= SHORTEST}
    for value in sorted(held, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return OF_THE_HUB.sub(HIDDEN, IN_A_URL.sub(rf"\g<1>{HIDDEN}", text))


def masked_words(words: Sequence[str]) -> list[str]:
    """A command's words, `masked`, and without what stands behind `--hub_token`, `HF_TOKEN=` and the like."""
    shown = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, _ = word.partition("=")
        if equals and SECRET.search(name):
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(HIDDEN if before.startswith("--") and SECRET.search(before) else masked(word))
    return shown
