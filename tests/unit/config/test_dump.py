"""What `dump` writes, `load` reads back equal: over random values of every field of the schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from taid_megatron.config.load import dump, load
from taid_megatron.config.schema import LOSS_OPTIONS, Config, Section

from .configs import make

# Names of folders that a YAML reader may take for something else.
TRICKY = ["1e-3", "yes", "null", "2024-01-01", "012", "12:30", "<<", "=", "0x1f", "1_000", ".5"]
TRICKY += ["- a", "a: b", "#x", " lead", "true", "", "a\nb", "ü/\u2028", ".inf", "[a", "'", '"']


def of_field(field: FieldInfo) -> st.SearchStrategy[Any]:
    return of_type(field.annotation, field.metadata)


def of_type(annotation: Any, bounds: list[Any]) -> st.SearchStrategy[Any]:
    """Values as YAML would hold them."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        below = [part for part in arguments[1:] if not isinstance(part, FieldInfo)]
        for part in arguments[1:]:
            below += part.metadata if isinstance(part, FieldInfo) else []
        return of_type(arguments[0], below)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(of_type(arguments[0], []), max_size=4)
    if origin is tuple:
        return st.tuples(*(of_type(argument, []) for argument in arguments)).map(list)
    if type(None) in arguments:
        return st.none() | of_type(arguments[0], bounds)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return of_section(annotation)
    if annotation is Path:
        # A leading ~ means the home folder; a lone surrogate is no text.
        names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
        return (st.sampled_from(TRICKY) | names).filter(lambda name: not name.startswith("~"))
    if annotation in (bool, str):
        return st.booleans() if annotation is bool else st.sampled_from(TRICKY)
    assert annotation in (int, float), annotation
    return of_number(annotation, bounds)


def of_number(kind: type, bounds: list[Any]) -> st.SearchStrategy[Any]:
    limits: dict[str, Any] = {}
    for bound in bounds:
        if isinstance(bound, (Ge, Gt)):
            limits["min_value"] = bound.ge if isinstance(bound, Ge) else bound.gt
        if isinstance(bound, (Le, Lt)):
            limits["max_value"] = bound.le if isinstance(bound, Le) else bound.lt
    excluded = [bound.gt for bound in bounds if isinstance(bound, Gt)]
    excluded += [bound.lt for bound in bounds if isinstance(bound, Lt)]
    finite = {"allow_nan": False, "allow_infinity": False} if kind is float else {}
    numbers = st.floats if kind is float else st.integers
    return numbers(**limits, **finite).filter(lambda value: value not in excluded)


def of_section(section: type[Section]) -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: of_field(field) for name, field in section.model_fields.items()}
    return st.fixed_dictionaries(fields).map(lambda tree: consistent(section.__name__, tree))


def consistent(section: str, tree: dict[str, Any]) -> dict[str, Any]:
    """What a section demands of its values together."""
    if section == "Training":
        tree["steps"], tree["tokens"] = (tree["steps"], None) if tree["steps"] else (None, 7)
    if section in ("Student", "Teacher", "Init", "RotaryScaling"):
        model(section, tree)
    if section == "Taid":
        tree["t_start"], tree["t_end"] = sorted((tree["t_start"], tree["t_end"]))
    if section == "Loss":
        foreign = {option for options in LOSS_OPTIONS.values() for option in options}
        tree |= dict.fromkeys(foreign - set(LOSS_OPTIONS[tree["name"]]))
        if tree["name"] == "gjs" and tree["beta"] is not None:
            tree["beta"] = 0.25
    if section == "Optimizer":
        tree["min_lr"], tree["lr"] = sorted((tree["min_lr"], tree["lr"]))
    return tree


def model(section: str, tree: dict[str, Any]) -> None:
    """The same, of a model's sections."""
    if section in ("Student", "Teacher"):
        tree["hf"] = None  # a folder that is there would be needed
    if section == "Teacher":
        checkpoint = tree["checkpoint"] or "teacher"
        tree["checkpoint"] = checkpoint if tree["architecture"] is None else None
        if tree["init"] is not None:
            tree["init"] = None if tree["checkpoint"] else {"source": "random", "layers": None}
    if section == "Init":
        layers = tree["layers"] or [0]
        tree["layers"] = layers if tree["source"] == "teacher" else None
    if section == "RotaryScaling":
        tree["low_freq_factor"], tree["high_freq_factor"] = 1.5, 2.5


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(tree=of_section(Config))
def test_load_reads_back_what_dump_wrote(tmp_path: Path, tree: dict[str, Any]):
    config = Config.model_validate(tree)
    path = tmp_path / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path) == config


@pytest.mark.parametrize("name", TRICKY)
def test_tricky_names_survive(tmp_path: Path, name: str):
    """In this loader and in a YAML 1.1 one, which other tools may read config.yaml with."""
    config = make(name)
    path = tmp_path / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path).run.folder == Path(name)
    assert yaml.safe_load(dump(config))["run"]["folder"] == str(Path(name))


def test_every_default_is_written_out():
    tree = yaml.safe_load(dump(make()))
    assert set(tree) == set(Config.model_fields)
    assert tree["taid"]["alpha"] == 5e-4
    assert tree["teacher"]["checkpoint"] is None
