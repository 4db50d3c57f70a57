"""The CPU engine, each in a process of its own: it changes torch for the whole process."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_names_cuda_is_made_on_the_cpu() -> None:
    _run(
        """
        import torch
        from taid_megatron.runtime import cpu_engine
        assert cpu_engine.install()
        for made in (
            torch.zeros(2, device="cuda"),
            torch.tensor([1.0], device=torch.device("cuda", 0)),
            torch.empty(3, device=torch.cuda.current_device()),
            torch.ones(2).to("cuda:0"),
            torch.ones(2).cuda(),
        ):
            assert made.device.type == "cpu"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        layer = torch.nn.Linear(2, 2)
        assert layer.cuda() is layer
        """
    )


def test_installing_twice_changes_nothing() -> None:
    """Entered twice, the mode would name types torch.cuda.cuda.FloatTensor: no gradient clipping."""
    _run(
        """
        import torch
        from taid_megatron.runtime import cpu_engine
        assert cpu_engine.install()
        scatter, state = torch.distributed.scatter, torch.cuda.get_rng_state
        assert cpu_engine.install()
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.distributed.scatter is scatter
        assert torch.cuda.get_rng_state is state
        """
    )


def test_with_cuda_it_does_nothing() -> None:
    _run(
        """
        import torch
        torch.cuda.is_available = lambda: True
        before = {name: getattr(torch.cuda, name) for name in dir(torch.cuda)}
        from taid_megatron.runtime import cpu_engine
        assert not cpu_engine.install()
        assert all(getattr(torch.cuda, name) is value for name, value in before.items())
        assert torch.overrides._get_current_function_mode() is None
        """
    )


@pytest.mark.parametrize("installed", [True, False])
def test_gloo_scatters_chunks_that_are_not_contiguous(installed) -> None:
    """Without the mend gloo sends the memory under a chunk, not the chunk; silently."""
    out = _run(
        f"""
        import torch, torch.distributed as dist
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if {installed}:
            from taid_megatron.runtime import cpu_engine
            cpu_engine.install()
        chunk = torch.arange(6.0).reshape(2, 3).t()
        received = torch.empty(3, 2)
        try:
            dist.scatter(received, [chunk], src=0)
        except (RuntimeError, ValueError):
            pass
        print(torch.equal(received, chunk))
        """
    )
    assert out.strip() == str(installed)
