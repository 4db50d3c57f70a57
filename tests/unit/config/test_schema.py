from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from taid_megatron.config.explain import explain, section_in
from taid_megatron.config.schema import Config, Section

from .configs import make


def sections(section: type[Section] = Config) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        below = section_in(field.annotation)
        if below:
            yield from sections(below)


def test_every_field_and_section_is_documented():
    """A field by its own docstring, a section by its class's."""
    undocumented = [
        f"{section.__name__}.{name}"
        for section in sections()
        for name, field in section.model_fields.items()
        if not field.description
        and not (section is Config and section_in(field.annotation) is not None)
    ]
    assert undocumented == []
    assert all("__doc__" in vars(section) and section.__doc__ for section in sections())


def test_all_sections_are_walked():
    names = {section.__name__ for section in sections()}
    assert {"Architecture", "BlendPart", "Recompute", "RampUp", "Logging"} <= names


def test_constraints_that_have_no_words_yet_are_explained_by_pydantics():
    class Even(Section):
        count: Annotated[int, Field(multiple_of=2)]
        """Pairs."""

    with pytest.raises(ValidationError) as refused:
        Even(count=3)
    assert explain(refused.value, Even, "even.yaml", []) == (
        "count is 3, expected a multiple of 2 (Pairs); change count in even.yaml"
    )


def test_a_configuration_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        make().training.seq_length = 3  # type: ignore[misc]
