from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import toy


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy run's configuration, its data written."""
    return toy.write_config(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def one_process(
    config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[dict[str, Any]]]:
    """Records of the run in one process, made once for each set of overrides."""
    made: dict[tuple[str, ...], list[dict[str, Any]]] = {}

    def records(*overrides: str) -> list[dict[str, Any]]:
        if overrides not in made:
            folder = tmp_path_factory.mktemp("one")
            made[overrides] = toy.train(config, folder, 1, *overrides)
        return made[overrides]

    return records
