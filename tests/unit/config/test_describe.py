"""docs/configuration.md is what the schema says now, whole."""

from __future__ import annotations

from pathlib import Path

from taid_megatron.config.describe import describe

from .test_schema import sections

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_page_is_up_to_date():
    """Mend: python -m taid_megatron.config.describe > docs/configuration.md."""
    assert PAGE.read_text(encoding="utf-8") == describe()


def test_every_field_has_its_row():
    fields = [name for section in set(sections()) for name in section.model_fields]
    # the sections at the top are headings
    rows = [line for line in describe().splitlines() if line.startswith("| `")]
    tops = [line for line in describe().splitlines() if line.startswith("## ")]
    for name in set(fields):
        found = sum(row.startswith(f"| `{name}` |") for row in rows)
        found += any(f"`{name}`" in heading for heading in tops)
        assert found >= fields.count(name), name
    assert not any("|  |" in row for row in rows), "a cell is empty"
