"""Errors that a user can mend: the command line shows their text as one line and exits with 2."""

from __future__ import annotations

from .secrets import hidden


class UserError(ValueError):
    """A bad argument, configuration or input; says what, the value, and the mend, in one line.

    Secrets in the message are blotted out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(hidden(" ".join(message.splitlines())))


class ConfigError(UserError):
    """A configuration that cannot be read, or whose values do not fit together."""
