"""The figures that the tests find, as JSON: TAID_GPU_FIGURES names the file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from taid_megatron.planning import stack

_found: dict[str, dict[str, Any]] = {}


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What a test puts in is shown (pytest -rA) and kept under its name, if the test fails too."""
    found: dict[str, Any] = {}
    yield found
    print(json.dumps(found))
    _found[request.node.name] = found


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = os.environ.get("TAID_GPU_FIGURES")
    if not path or not _found:
        return
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "card": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "versions": dict(stack.versions()),
        "failed": session.testsfailed,
    }
    Path(path).write_text(json.dumps({"about": about, "figures": _found}, indent=1) + "\n")
