"""Transformer Engine that is there and cannot be used, in processes of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from .test_cpu_engine import _run

AS_ON_A_CPU = "raise RuntimeError('Found no NVIDIA driver\\n on your system')"


@pytest.fixture(autouse=True)
def broken_package(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "pytorch" / "__init__.py").write_text(AS_ON_A_CPU)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[3]}")


def test_without_a_gpu_megatron_does_without_it() -> None:
    _run(
        """
        from taid_megatron.runtime import cpu_engine
        cpu_engine.prepare_import()
        import megatron.core.fp8_utils
        assert not megatron.core.fp8_utils.HAVE_TE
        from taid_megatron.runtime.distributed import abilities
        machine = abilities()
        assert not machine.has_transformer_engine
        assert machine.transformer_engine == "no GPU", machine
        """
    )


def test_a_failing_import_is_told_in_one_line_and_does_not_come_back() -> None:
    _run(
        """
        import torch
        torch.cuda.is_available = lambda: True
        from taid_megatron.runtime import transformer_engine
        usable, why = transformer_engine.probe()
        assert not usable
        assert why == "its import failed, RuntimeError: Found no NVIDIA driver", why
        for name in ("transformer_engine", "transformer_engine.pytorch.fp8"):
            try:
                __import__(name)
            except ImportError:
                continue
            raise AssertionError(name)
        """
    )
