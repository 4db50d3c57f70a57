"""Values of a configuration for shell scripts, one a line, without torch.

python -m taid_megatron.config.value CONFIG [section.key=value ...] -- section.key ...

A value that is not set is an empty line. Exit code 2, with one line, where the configuration is
bad or could teach nothing: a launch script thus refuses it once, before any rank starts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from .checks import check_taught
from .errors import ConfigError, UserError
from .load import load
from .schema import Config


def value(config: Config, key: str) -> str:
    """`section.key` as text, none as ''. Raises ConfigError for a key that is not there."""
    found: Any = config.model_dump(mode="json")
    for name in key.split("."):
        if not isinstance(found, dict) or name not in found:
            raise ConfigError(f"{key}: no such key; docs/configuration.md has them all")
        found = found[name]
    return "" if found is None else str(found)


def main(arguments: Sequence[str]) -> int:
    """Print the asked values; returns the exit code."""
    if "--" not in arguments[1:]:
        print("usage: CONFIG [section.key=value ...] -- section.key ...", file=sys.stderr)
        return 2
    split = arguments.index("--", 1)
    try:
        config = load(arguments[0], arguments[1:split])
        check_taught(config)
        lines = [value(config, key) for key in arguments[split + 1 :]]
    except UserError as error:
        print(f"taid-megatron: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
