"""A configuration from YAML and back: `load` and `dump`.

YAML is read by the rules of YAML 1.2 where 1.1 surprises: `1e-3` is a number, `012` and `12:30` and
`2024-01-01` are text, and only true and false are truth values. Underscores may group digits
(`tokens: 1_000_000_000`). A key given twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .errors import ConfigError
from .explain import cut, explain
from .schema import Config
from .secrets import found
from .weights import with_architectures

Tree = dict[str, Any]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides in order, and check every value.

    Values of overrides are YAML; `key=` and `key=null` mean none; a section or list is replaced
    whole. Relative paths stay relative to the current directory, `~` is expanded. Raises
    ConfigError, one line.
    """
    tree = read_tree(path)
    return from_tree(tree, str(path), overrides)


def read_tree(path: str | Path) -> Tree:
    """The sections in a YAML file, values unchecked. Raises ConfigError, one line."""
    return _parse(_read(Path(path)), str(path))


def from_tree(tree: Tree, source: str, overrides: Sequence[str] = ()) -> Config:
    """As `load`, of sections that did not come from a file as they are; source: what to call it."""
    overridden = [_override(tree, text) for text in overrides]
    if secret := found(tree):
        raise ConfigError(
            f"{secret}, and a run writes its configuration out: give it to the program that needs "
            "it through the environment"
        )
    tree = with_architectures(tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, Config, source, overridden)) from None
    values = config.model_dump()
    _refuse_truth_as_number(tree, values)
    return Config.model_validate(_expand(values))


def dump(config: Config) -> str:
    """YAML that `load` reads back to an equal configuration, every default written out."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def _read(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a YAML configuration") from None
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({reason}); give a readable file") from None
    except ValueError:
        raise ConfigError(f"{path}: is not UTF-8 text; give a YAML configuration") from None


def _parse(text: str, source: str) -> Tree:
    """The mapping in a YAML document; an empty document is an empty mapping."""
    tree = _yaml(text, source)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{source}: holds a {type(tree).__name__}, expected sections such as 'training:' "
            "with their keys indented below"
        )
    return tree


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(
            f"{source}{line}: malformed YAML, {problem}; mend it (indentation, quotes, brackets)"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{source}: malformed YAML, {error}; remove the characters that are not plain text"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: malformed value, {error}; write it plainly") from None


def _override(tree: Tree, text: str) -> str:
    """Set `section.key=value` in the tree; returns the dotted key."""
    name = f"override '{cut(text)}'"
    dotted, equals, value = text.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys) or dotted != dotted.strip():
        raise ConfigError(
            f"{name}: expected section.key=value without spaces around '=', "
            "such as optimizer.lr=1e-3"
        )
    for depth, key in enumerate(keys[:-1], start=1):
        if tree.get(key) is None:
            tree[key] = {}
        elif not isinstance(tree[key], dict):
            above = ".".join(keys[:depth])
            raise ConfigError(
                f"{name}: {above} is {cut(repr(tree[key]))}, which has no keys; "
                f"override it whole, {above}=VALUE"
            )
        else:
            # A copy: a YAML alias may have put one mapping under two keys.
            tree[key] = dict(tree[key])
        tree = tree[key]
    tree[keys[-1]] = _yaml(value, name)
    return dotted


def _refuse_truth_as_number(given: Any, read: Any, key: str = "") -> None:
    """Refuse true and false where a number is expected: pydantic would read them as 1 and 0."""
    if isinstance(given, bool) and not isinstance(read, bool):
        raise ConfigError(f"{key} is {str(given).lower()}, expected a number; give one")
    for name, below, below_read in _children(given, read):
        _refuse_truth_as_number(below, below_read, f"{key}.{name}".lstrip("."))


def _children(given: Any, read: Any) -> Iterator[tuple[object, Any, Any]]:
    """(name, value as given, value as read) of everything directly inside a mapping or list."""
    if isinstance(given, Mapping) and isinstance(read, Mapping):
        yield from ((name, given[name], read[name]) for name in given)
    elif isinstance(given, list) and isinstance(read, (list, tuple)):
        yield from ((index, *pair) for index, pair in enumerate(zip(given, read, strict=True)))


def _expand(value: Any) -> Any:
    """The same values with `~` and `~user` of paths replaced by the home folder."""
    if isinstance(value, Mapping):
        return {key: _expand(below) for key, below in value.items()}
    if isinstance(value, tuple):
        return tuple(_expand(below) for below in value)
    if isinstance(value, Path):
        try:
            return value.expanduser()
        except RuntimeError as error:
            raise ConfigError(f"path {value}: {error}; write the folder out") from None
    return value


# YAML 1.2's plain scalars that are not text. Text that looks like YAML 1.1's is quoted when written
# (other tools read config.yaml too) and read as the text it is.
_SCALARS = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9_]*)\.[0-9]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?(?:0|[1-9][0-9_]*)[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
)


_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """Safe, YAML 1.2's scalars, text keys, no key twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping with its keys checked: here, because merging (`<<`) repeats keys later on."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag not in _KEY_TAGS or not isinstance(key, yaml.ScalarNode):
                problem = "a key is not a plain name"
            elif key.value in seen:
                problem = f"the key '{key.value}' is given twice, keep one"
            else:
                seen.add(key.value)
                continue
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML version would read as something else."""


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))
