"""Secrets: refused in a configuration, and blotted out of every text that is shown or written.

A secret is the value of an environment variable whose name ends as secrets' names do (HF_TOKEN,
WANDB_API_KEY, AWS_SECRET_ACCESS_KEY), a user's part of a URL, a token in its query, or a token of
the well-known forms.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

BLOT = "***"
_NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY(_ID)?|PRIVATE_KEY)$", re.I)
_SHORTEST = 8  # a shorter value is a switch, or would be found in plain words
_QUERY = "token|access_token|auth|api_?key|key|secret|password|sig|signature|x-amz-[a-z-]+"
_FORMS = re.compile(
    r"(?<=://)[^/\s'\"@]+(?=@)"
    rf"|(?<=[?&])(?:{_QUERY})=[^&\s'\"]+"
    r"|\bhf_[A-Za-z0-9]{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}|\bsk-(?:[a-z]+-)?[A-Za-z0-9]{24,}",
    re.I,
)


def _of_environment() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAMES.search(name):
            yield name, value


def hidden(text: str) -> str:
    """The text with *** in place of every secret."""
    for _, value in _of_environment():
        text = text.replace(value, BLOT)
    return _FORMS.sub(BLOT, text)


def found(value: Any, key: str = "") -> str | None:
    """What in a configuration's values is a secret, and where, without telling it; None: nothing.

    value: sections as they are read from YAML.
    """
    if isinstance(value, Mapping):
        places = [(f"{key}.{name}".lstrip("."), below) for name, below in value.items()]
        return next((text for place in places if (text := found(place[1], place[0]))), None)
    if isinstance(value, (list, tuple)):
        return next((text for below in value if (text := found(below, key))), None)
    if not isinstance(value, str):
        return None
    for name, secret in _of_environment():
        if secret in value:
            return f"{key} holds the value of ${name}"
    return f"{key} holds a password or token" if _FORMS.search(value) else None
