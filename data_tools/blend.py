"""A blend: prepared prefixes and their weights, in the form that the trainer's data.blend takes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from data_tools.manifest import (
    DataError,
    bin_path,
    idx_path,
    manifest_path,
    write_atomically,
)
from data_tools.verify import verify


def write_blend(weights: Mapping[str, float | None], out: str | Path) -> dict[str, float]:
    """Writes [{prefix: ..., weight: ...}, ...] as one line of YAML; returns the weights used.

    weights: by prefix, relative; None for all: each prefix weighs as many tokens as it has. Raises
    DataError where a prefix is not there or damaged, a weight is no share, the tokenizers differ,
    or `out` is taken.
    """
    if not weights:
        raise DataError("nothing to blend; give PREFIX or PREFIX=WEIGHT")
    given = [weight for weight in weights.values() if weight is not None]
    if given and len(given) != len(weights):
        raise DataError("some prefixes have a weight and some none; give it to all or to none")
    if not all(math.isfinite(weight) and weight > 0 for weight in given):
        raise DataError(f"weights {given}; give numbers above 0")
    if not math.isfinite(100 * sum(given)):  # percentages are made of them
        raise DataError(f"weights {given} are too large to be added; give smaller numbers")
    _check_out(Path(out), list(weights))
    used: dict[str, float] = {}
    made_by: dict[str, str] = {}
    for prefix, weight in weights.items():
        verdict = verify(prefix, fast=True)
        if not verdict.files.num_tokens:
            raise DataError(f"{bin_path(prefix)}: holds no token; leave it out")
        if verdict.manifest:
            made_by[prefix] = verdict.manifest.tokenizer.fingerprint
        used[prefix] = float(verdict.files.num_tokens) if weight is None else weight
    if len({*made_by.values()}) > 1:
        raise DataError(f"{', '.join(made_by)}: not of one tokenizer; prepare them with the same")
    parts = [{"prefix": prefix, "weight": weight} for prefix, weight in used.items()]
    line = yaml.safe_dump(parts, default_flow_style=True, width=math.inf, sort_keys=False)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(out), line.encode())
    return used


def _check_out(out: Path, prefixes: list[str]) -> None:
    if out.is_dir():
        raise DataError(f"{out}: is a folder; give another --out")
    for prefix in prefixes:
        files = (bin_path(prefix), idx_path(prefix), manifest_path(prefix))
        if os.path.realpath(out) in map(os.path.realpath, files):
            raise DataError(f"{out}: is a file of {prefix}; give another --out")
