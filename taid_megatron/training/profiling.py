"""A profiler trace and a memory snapshot of chosen steps."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch

from taid_megatron.config.schema import Logging
from taid_megatron.runtime.distributed import World


class Profiler:
    """Writes RUN/profile/trace_rank<r>.json and memory_rank<r>.pickle where logging asks for it.

    The trace covers the steps logging.profile_steps; the snapshot is the CUDA allocator's history
    up to logging.memory_snapshot_step (for pytorch.org/memory_viz).
    """

    def __init__(self, settings: Logging, run_folder: Path, world: World) -> None:
        self._steps = settings.profile_steps
        self._snapshot_step = settings.memory_snapshot_step
        self._folder = run_folder / "profile"
        self._world = world
        self._trace: torch.profiler.profile | None = None
        if self._snapshot_step and world.device.type == "cuda":
            torch.cuda.memory._record_memory_history()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._finish()

    def before(self, step: int) -> None:
        """Step `step` (from 1) is about to run."""
        if self._steps and self._trace is None and self._steps[0] <= step <= self._steps[1]:
            self._trace = torch.profiler.profile(record_shapes=True)
            self._trace.__enter__()

    def after(self, step: int) -> None:
        """Step `step` has run."""
        if self._steps and step == self._steps[1]:
            self._finish()
        if step == self._snapshot_step and self._world.device.type == "cuda":
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(
                str(self._folder / f"memory_rank{self._world.rank}.pickle")
            )
            torch.cuda.memory._record_memory_history(enabled=None)

    def _finish(self) -> None:
        if self._trace is None:
            return
        self._trace.__exit__(None, None, None)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._trace.export_chrome_trace(str(self._folder / f"trace_rank{self._world.rank}.json"))
        self._trace, self._steps = None, None
