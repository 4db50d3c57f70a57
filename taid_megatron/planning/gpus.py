"""The kinds of GPU that a plan can be made for: gpus.yaml."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import yaml

from taid_megatron.config.errors import UserError

_FILE = Path(__file__).with_name("gpus.yaml")


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One kind of GPU in its usual server; units and sources are in gpus.yaml."""

    name: str
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float | None
    memory_gb_s: float
    link_gb_s: float
    network_gb_s: float
    gpus_per_node: int
    compute_capability: tuple[int, int]
    source: str


def kinds() -> dict[str, GPU]:
    """Every known kind by its name."""
    table = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    for row in table.values():
        row["compute_capability"] = tuple(row["compute_capability"])
    return {name: GPU(name=name, **row) for name, row in table.items()}


def find(name: str) -> GPU:
    """The kind of that name, case aside. Raises UserError with the known ones."""
    known = kinds()
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f", perhaps {near[0]}?" if near else ""
    raise UserError(f"--gpu {name}: not a known kind{hint} (known: {', '.join(known)})")
