from __future__ import annotations

from pathlib import Path

import pytest

from ..distributed import toy


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy run's configuration, its data written."""
    return toy.write_config(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def straight(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of six steps with checkpoints at 2, 4 and 6; not to be changed."""
    folder = tmp_path_factory.mktemp("straight")
    toy.train(config, folder, 1, "training.steps=6", "checkpoint.every=2", save=True)
    return folder
