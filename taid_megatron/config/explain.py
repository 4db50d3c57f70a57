"""What is wrong with a configuration, in one line: key, value, what is expected, the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from .schema import Section
from .secrets import hidden

Problem = Any  # pydantic's ErrorDetails: type, loc, input, msg, ctx

_RANGES = {
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
    "too_long": "at most {max_length} values",
}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a number",
    "bool": "true or false",
    "path": "a path (in quotes where it is a number)",
    "string": "text",
    "model": "a section: its keys, indented below it",
    "tuple": "a list",
    "literal": "one of {expected}",
}


def explain(
    error: ValidationError, root: type[Section], source: str, overridden: Sequence[str]
) -> str:
    """One line for the first problem, an unknown key before others, and the count of the rest.

    `source` names the file; `overridden` are the dotted keys that came from overrides instead.
    """
    # A mistyped key is two problems, unknown and missing: the unknown one says what was meant.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    text = _one(problems[0], root, source, overridden)
    more = len(problems) - 1
    return f"{text} ({more} more like this)" if more else text


def _one(problem: Problem, root: type[Section], source: str, overridden: Sequence[str]) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "the configuration"
    section, field = _find(problem["loc"], root)
    meaning = _meaning(field)
    kind = problem["type"]
    if kind == "extra_forbidden":
        return f"{key} is not a known key; {_known(problem['loc'], section, root)}"
    if kind == "missing":
        return f"{key} is missing{meaning}; {_addition(problem['loc'], field, source)}"
    from_override = any(key == name or key.startswith(f"{name}.") for name in overridden)
    mend = f"change the override of {key}" if from_override else f"change {key} in {source}"
    if kind == "value_error":
        return f"{key}: {problem['ctx']['error']}; {mend}"
    return f"{key} is {_short(problem['input'])}, expected {_expected(problem)}{meaning}; {mend}"


def _find(loc: Sequence[int | str], root: type[Section]) -> tuple[type[Section], FieldInfo | None]:
    """The section that should hold the key at `loc`, and the key's field where it has one."""
    section, field = root, None
    for name in (part for part in loc if isinstance(part, str)):
        if field is not None:
            section = section_in(field.annotation) or section
        field = section.model_fields.get(name)
    return section, field


def section_in(annotation: Any) -> type[Section] | None:
    """The section class inside `Section`, `Section | None`, `tuple[Section, ...]`; else none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (section_in(argument) for argument in get_args(annotation))
    return next((section for section in found if section), None)


def _known(loc: Sequence[int | str], section: type[Section], root: type[Section]) -> str:
    """What may have been meant, and the keys that there are."""
    name = str(loc[-1])
    prefix = "".join(f"{part}." for part in loc[:-1])
    near = difflib.get_close_matches(name, section.model_fields, n=1, cutoff=0.6)
    meant = [prefix + near[0]] if near else _elsewhere(name, root)
    where = f"keys of {prefix.rstrip('.')}" if prefix else "sections"
    known = f"known {where}: {', '.join(section.model_fields)}"
    return f"did you mean {' or '.join(meant)}? ({known})" if meant else known


def _elsewhere(name: str, root: type[Section]) -> list[str]:
    """Dotted keys of other sections that end in this name."""
    return [dotted for dotted in dotted_keys(root) if dotted.rpartition(".")[2] == name]


def dotted_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Every key of a section and of those inside it, as overrides write them."""
    for name, field in section.model_fields.items():
        yield prefix + name
        below = section_in(field.annotation)
        if below:
            yield from dotted_keys(below, f"{prefix}{name}.")


def _meaning(field: FieldInfo | None) -> str:
    """The field's documentation, in brackets."""
    if field is None or field.description is None:
        return ""
    return f" ({' '.join(field.description.split()).rstrip('.')})"


def _addition(loc: Sequence[int | str], field: FieldInfo | None, source: str) -> str:
    if isinstance(loc[-1], int):
        return "give all values of the list"
    below = section_in(field.annotation) if field else None
    if below:
        required = [name for name, field in below.model_fields.items() if field.is_required()]
        return f"add the section to {source} with at least {', '.join(required)}"
    return f"add it to {source} or give {'.'.join(map(str, loc))}=VALUE"


def _expected(problem: Problem) -> str:
    values = problem.get("ctx", {})
    kind = problem["type"]
    text = _RANGES.get(kind) or _KINDS.get(kind.partition("_")[0])
    if text is None:
        return problem["msg"].removeprefix("Input should be ")
    return text.format(**values)


def _short(value: object) -> str:
    """The value, cut to a readable length; none and truth values as YAML has them."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else cut(repr(value))


def cut(text: str, length: int = 80) -> str:
    """The text, or its start and an ellipsis where it is longer; secrets blotted out before."""
    text = hidden(text)
    return text if len(text) <= length else f"{text[: length - 3]}..."
