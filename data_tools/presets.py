"""Corpora of several parts, prepared by name."""

from __future__ import annotations

import glob
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_tools.blend import write_blend
from data_tools.hub import is_on_hub
from data_tools.manifest import DataError, Manifest
from data_tools.prepare import Progress, Settings, prepare


@dataclass(frozen=True)
class CorpusPart:
    """A folder of a corpus."""

    name: str
    pattern: str
    """Of its files, below the corpus' folder."""
    tokens: float
    """As published; what it weighs where no weights are given."""
    mend: str = ""
    """How to come by the files where they are missing."""


PRESETS: dict[str, tuple[CorpusPart, ...]] = {
    # Sizes: the data set's card. Weights by size are the corpus as it is; what blend other models
    # were trained on was not published with it.
    "smollm-corpus": (
        CorpusPart("cosmopedia-v2", "cosmopedia-v2/*.parquet", 28e9),
        CorpusPart("fineweb-edu-dedup", "fineweb-edu-dedup/*.parquet", 220e9),
        CorpusPart(
            "python-edu",
            "python-edu/text/*.jsonl.gz",
            4e9,
            "its Parquet files hold ids only: taid-data fetch-python-edu {source} --out {folder}",
        ),
    ),
}


def preset_parts(preset: str, chosen: Sequence[str] = ()) -> tuple[CorpusPart, ...]:
    """The corpus' parts, or those of these names. Raises DataError for names that it lacks."""
    if preset not in PRESETS:
        raise DataError(f"preset {preset!r}; there is {', '.join(PRESETS)}")
    parts = PRESETS[preset]
    unknown = {*chosen} - {part.name for part in parts}
    if unknown:
        names = ", ".join(part.name for part in parts)
        raise DataError(f"no part {', '.join(sorted(unknown))} in {preset}; it has {names}")
    return tuple(part for part in parts if not chosen or part.name in chosen)


def prepare_preset(
    preset: str,
    roots: Sequence[str | Path],
    tokenizer: str | Path,
    out_folder: str | Path,
    settings: Settings,
    *,
    weights: Mapping[str, float | None] | None = None,
    progress: Callable[[str, Progress], None] = lambda part, state: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Manifest]:
    """Prepares each part of the corpus as OUT/PART, then writes OUT/blend.yaml.

    roots: copies of the data set, or its address on the hub; a part is taken from the first that
    has it. weights: of the parts to prepare, by name; none: all parts, by their published sizes. A
    token budget is dealt out by the weights; a fraction holds for each part, in the order of its
    files' names, which its manifest lists. A part that is done is not done again. Raises DataError
    where a part has no files, a weight is of no part or no share, or `prepare` does.
    """
    parts = preset_parts(preset, list(weights or {}))
    chosen = _checked(weights or {})
    shares = {part.name: chosen.get(part.name, part.tokens) for part in parts}
    inputs = {part.name: _find(part, roots) for part in parts}
    made = {}
    for part in parts:
        own = replace(settings, reuse=not settings.restart)
        if settings.token_budget is not None:
            share = shares[part.name] / sum(shares.values())
            own = replace(own, token_budget=max(1, round(settings.token_budget * share)))
        say(f"{part.name}: {inputs[part.name]}")

        def show(state: Progress, name: str = part.name) -> None:
            progress(name, state)

        prefix = Path(out_folder) / part.name
        made[part.name] = prepare(
            [inputs[part.name]], tokenizer, prefix, own, progress=show, say=say
        )
    if settings.shard is None:
        used = {str(Path(out_folder) / name): share for name, share in shares.items()}
        write_blend(used, Path(out_folder) / "blend.yaml")
    return made


def _checked(weights: Mapping[str, float | None]) -> dict[str, float]:
    """Raises DataError where one is no share: what it would leave out is said by naming others."""
    checked = {}
    for name, weight in weights.items():
        if weight is None:
            raise DataError(f"part {name}: no weight; give {name}=WEIGHT")
        if not 0 < weight < math.inf:
            raise DataError(
                f"{name}={weight:g}: no weight; give a number above 0, or leave the part out by "
                "naming the others"
            )
        checked[name] = weight
    return checked


def _find(part: CorpusPart, roots: Sequence[str | Path]) -> str:
    """The part's files, as an input for `prepare`."""
    folder, _, files = part.pattern.rpartition("/")
    for root in roots:
        if not is_on_hub(root):
            # The part's stars are a pattern, those of the folder's own name are not.
            pattern = str(Path(glob.escape(str(root))) / part.pattern)
            if glob.glob(pattern):
                return pattern
        elif files.endswith(".parquet"):
            return f"{str(root).rstrip('/')}/{folder}"
    local = [root for root in roots if not is_on_hub(root)]
    first, target = str(roots[0]), [*local, "smollm-corpus"][0]
    source = f"{first}/{part.name}"
    if not is_on_hub(first):
        source = glob.escape(source) + "/*.parquet"
    quoted = {"source": shlex.quote(source), "folder": shlex.quote(f"{target}/{part.name}")}
    hint = part.mend.format(**quoted) or "check the folder"
    if not local:
        hint += f", and give {target} beside it"
    raise DataError(
        f"{roots[0]}/{part.pattern}: no such file; {hint}, or name the other parts by --weight"
    )
