"""A run's figures in Weights & Biases as well, where `logging.wandb` names a project.

The package is imported here alone, and only when asked for. Its key comes from the environment or
from `wandb login`; WANDB_MODE=offline keeps everything in RUN/wandb.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taid_megatron.config.errors import UserError
from taid_megatron.config.schema import Config

_ID = "wandb_id"


class WandbLog:
    """One W&B run per run folder: a resume goes on in it. Use on one rank; close() at the end."""

    def __init__(self, config: Config) -> None:
        """Raises UserError where W&B refuses, such as without a key."""
        import wandb

        folder, project = config.run.folder, config.logging.wandb
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                id=_identity(folder),
                resume="allow",
                dir=str(folder),
                config=config.model_dump(mode="json"),
            )
        except Exception as error:  # its kinds differ between versions
            raise UserError(
                f"logging.wandb={project}: {error}; run `wandb login`, set WANDB_MODE=offline, or "
                "set logging.wandb=null"
            ) from error
        # Steps of its own would have to rise; a resume may go back to an earlier one.
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Mapping[str, Any]) -> None:
        """The finite numbers of a record."""
        figures = {
            name: value
            for name, value in record.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        self._run.log(figures)

    def close(self) -> None:
        """Wait for what is still to be sent."""
        self._run.finish()


def _identity(folder: Path) -> str:
    """The same for every start of a run folder."""
    path = folder / _ID
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
