"""docs/configuration.md from the schema: every section and field, its type, default and meaning.

Run it after a change of the schema (a test compares the two):

    python -m taid_megatron.config.describe > docs/configuration.md
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from .explain import section_in
from .schema import Config, Section

_HEAD = """\
# Configuration

Generated from `taid_megatron/config/schema.py` by `python -m taid_megatron.config.describe`; change
the docstrings there.

A run is one YAML file with the sections below. `taid-megatron train FILE section.key=value ...`
replaces single values; a list or a section is replaced whole, `key=null` means none. Values follow
YAML 1.2 (`1e-3` is a number, `yes` is text), and digits may be grouped (`1_000_000`). A relative
path starts at the current folder. An unknown key, a wrong type or values that do not fit together
end the command with exit code 2 and one line that says what to change.
"""
_KINDS = {bool: "true or false", int: "whole number", float: "number", Path: "path", str: "text"}
_BOUNDS = ((Gt, "gt", ">"), (Ge, "ge", ">="), (Lt, "lt", "<"), (Le, "le", "<="))


def describe(root: type[Section] = Config) -> str:
    """The whole page, Markdown. A section that stands at several keys is described once."""
    places: dict[type[Section], list[str]] = {}
    for key, section in _sections(root, ""):
        places.setdefault(section, []).append(key)
    required = [f"`{name}`" for name, field in root.model_fields.items() if field.is_required()]
    asked = f"Sections that every run needs: {', '.join(required)}.\n"
    return "\n".join([_HEAD, asked, *(_section(*place) for place in places.items())])


def _sections(section: type[Section], prefix: str) -> Iterator[tuple[str, type[Section]]]:
    """(dotted key, section) of all sections below one, in the schema's order."""
    for name, field in section.model_fields.items():
        if below := section_in(field.annotation):
            key = f"{prefix}{name}"
            yield key, below
            yield from _sections(below, f"{key}.")


def _section(section: type[Section], keys: Iterable[str]) -> str:
    heading = ", ".join(f"`{key}`" for key in keys)
    rows = [
        f"| `{name}` | {_type(field.annotation, field.metadata)} | {_default(field)} "
        f"| {_one_line(field.description)} |"
        for name, field in section.model_fields.items()
    ]
    table = ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows]
    return "\n".join([f"## {heading}", "", _one_line(section.__doc__), "", *table, ""])


def _type(annotation: Any, bounds: Iterable[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [bound for part in arguments[1:] for bound in getattr(part, "metadata", [])]
        return _type(arguments[0], inner)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list ({_type(arguments[0], [])})"
    if origin is tuple:
        return f"{len(arguments)} values ({_type(arguments[0], [])})"
    if type(None) in arguments:
        return f"{_type(arguments[0], bounds)}, or null"
    if section_in(annotation):
        return "section"
    limits = [
        f"{sign} {getattr(bound, name):g}"
        for bound in bounds
        for kind, name, sign in _BOUNDS
        if isinstance(bound, kind)
    ]
    return " ".join([_KINDS[annotation], " and ".join(limits)]).strip()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, Section):
        return "its defaults"
    return f"`{json.dumps(field.default)}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", r"\|")


if __name__ == "__main__":
    print(describe(), end="")
