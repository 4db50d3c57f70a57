"""The CPU engine, in processes of its own: it changes torch for the whole process."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def _run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_without_cuda() -> None:
    _run(
        """
        import torch, torch.distributed as dist
        from taid_megatron.runtime import cpu_engine
        assert cpu_engine.install()
        scatter, state = dist.scatter, torch.cuda.get_rng_state

        # entered twice, the mode would name a type torch.cuda.cuda.FloatTensor, and megatron-core
        # would clip no gradient
        assert cpu_engine.install()
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert dist.scatter is scatter and torch.cuda.get_rng_state is state

        for made in (
            torch.zeros(2, device="cuda"),
            torch.tensor([1.0], device=torch.device("cuda", 0)),
            torch.empty(3, device=torch.cuda.current_device()),
            torch.ones(2).to("cuda:0"),
            torch.ones(2).cuda(),
        ):
            assert made.device.type == "cpu"
        layer = torch.nn.Linear(2, 2)
        assert layer.cuda() is layer

        # without the mend gloo sends the memory under a chunk, not the chunk; silently
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        chunk = torch.arange(6.0).reshape(2, 3).t()
        received = torch.empty(3, 2)
        dist.scatter(received, [chunk], src=0)
        assert torch.equal(received, chunk)
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
