"""Which layers carry the models and in which number formats: what was asked, what the machine has.

Transformer Engine's layers are taken where it is there and a model is bf16: in fp32 it multiplies
in TF32, three digits less than the name says. FP8 is a matter of its layers alone; embedding, head,
norms and loss stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError
from .schema import Architecture, Config, Engine


@dataclass(frozen=True, kw_only=True)
class EngineAbilities:
    """What the machine offers; the runtime finds out, so that this package imports no torch."""

    has_cuda: bool
    """Whether torch can use a GPU."""
    has_transformer_engine: bool
    """Whether Transformer Engine is installed and usable."""
    has_apex: bool
    """Whether Apex's fused gradient accumulation is installed."""
    gpu_count: int
    """GPUs of this node; 0 without CUDA."""
    transformer_engine: str = "not installed"
    """Its version, or why it cannot be used."""
    compute_capability: tuple[int, int] | None = None
    """Of the node's oldest GPU; None: not known, and not checked."""
    cuda_version: tuple[int, int] | None = None
    """That torch was built with; None: not known, and not checked."""


# From which GPUs on a recipe runs, and from which CUDA. Source: Transformer Engine 2.11,
# pytorch/quantization.py.
_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
_BLOCKWISE_CUDA = (12, 9)
_NO_MXFP8 = (12, 0)
"""GPUs of this capability and above (consumer Blackwell) lack some of mxfp8's products."""
# Every side of a matrix product is a multiple of this.
_STEP = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
_BLOCK = 128
"""blockwise: what sequence parallelism gathers comes in whole blocks."""


def takes_transformer_engine(engine: Engine, precision: str, abilities: EngineAbilities) -> bool:
    """Whether a model of this precision gets Transformer Engine's layers."""
    return _without(engine, precision, abilities) is None


def describe(config: Config, abilities: EngineAbilities) -> str:
    """One line for the user: which layers carry each model, and why."""
    parts = []
    for model, precision, fp8 in _models(config):
        reason = _without(config.engine, precision, abilities)
        if reason is None:
            kind = f"Transformer Engine {abilities.transformer_engine}"
            kind += "" if fp8 == "none" else f", FP8 {fp8}"
        else:
            kind = f"megatron-core's own with torch's attention ({reason})"
        parts.append((model, kind))
    if len({kind for _, kind in parts}) == 1:
        return f"layers: {parts[0][1]}"
    return "layers: " + "; ".join(f"{model}: {kind}" for model, kind in parts)


def check_engine(
    config: Config, teacher_architecture: Architecture | None, abilities: EngineAbilities
) -> None:
    """Raise ConfigError for layers or formats that this machine or these models cannot have."""
    engine, precision = config.engine, config.training.precision
    if engine.layers == "te" and (reason := _without(engine, precision, abilities)):
        mend = "install it: pip install 'taid-megatron[te]', or set engine.layers=auto"
        if abilities.has_transformer_engine:
            mend = "set training.precision=bf16 or engine.layers=auto"
        raise ConfigError(f"engine.layers=te cannot be had ({reason}); {mend}")
    if engine.teacher_fp8 != "none" and config.teacher is None:
        raise ConfigError(
            f"engine.teacher_fp8={engine.teacher_fp8} without a teacher; set "
            "engine.teacher_fp8=none"
        )
    if engine.teacher_fp8 == "delayed":
        raise ConfigError(
            "engine.teacher_fp8=delayed takes scales from earlier steps, and a frozen teacher's "
            "weights are converted once, before the first; set engine.teacher_fp8=tensorwise"
        )
    shapes = {"student": config.student.architecture}
    if teacher := teacher_architecture or (config.teacher and config.teacher.architecture):
        shapes["teacher"] = teacher
    for model, model_precision, fp8 in _models(config):
        if fp8 == "none":
            continue
        key = "engine.fp8" if model == "student" else "engine.teacher_fp8"
        if reason := _without(engine, model_precision, abilities):
            raise ConfigError(
                f"{key}={fp8} needs Transformer Engine's layers, which the {model} does not get "
                f"({reason}); mend that, or set {key}=none"
            )
        _check_gpu(f"{key}={fp8}", fp8, abilities)
        if model in shapes:
            _check_sides(key, fp8, model, shapes[model], config)


def _models(config: Config) -> list[tuple[str, str, str]]:
    """(name, precision, FP8 recipe) of each model."""
    precision = config.training.precision
    models: list[tuple[str, str, str]] = [("student", precision, config.engine.fp8)]
    if config.teacher is not None:
        of_teacher = config.teacher.precision or precision
        models.append(("teacher", of_teacher, config.engine.teacher_fp8))
    return models


def _without(engine: Engine, precision: str, abilities: EngineAbilities) -> str | None:
    """Why a model does not get Transformer Engine's layers; None: it does."""
    if engine.layers == "local":
        return "engine.layers=local"
    if not abilities.has_transformer_engine:
        return f"Transformer Engine: {abilities.transformer_engine}"
    if precision != "bf16":
        return f"Transformer Engine would multiply {precision} in TF32"
    return None


def _check_gpu(asked: str, recipe: str, abilities: EngineAbilities) -> None:
    key, _, _ = asked.partition("=")
    found, least = abilities.compute_capability, _CAPABILITY[recipe]
    if found is not None and (found < least or (recipe == "mxfp8" and found >= _NO_MXFP8)):
        below = f" and below {_version(_NO_MXFP8)}" if recipe == "mxfp8" else ""
        other = "tensorwise" if found >= _CAPABILITY["tensorwise"] else "none"
        raise ConfigError(
            f"{asked} needs a GPU of compute capability {_version(least)} or more{below}, this one "
            f"has {_version(found)}; set {key}={other}"
        )
    cuda = abilities.cuda_version
    if recipe == "blockwise" and cuda is not None and cuda < _BLOCKWISE_CUDA:
        raise ConfigError(
            f"{asked} needs CUDA {_version(_BLOCKWISE_CUDA)} or later, torch was built with "
            f"{_version(cuda)}; install another build of torch, or set {key}=tensorwise"
        )


def _version(parts: tuple[int, int]) -> str:
    return f"{parts[0]}.{parts[1]}"


def _check_sides(key: str, recipe: str, model: str, shape: Architecture, config: Config) -> None:
    """Tokens and widths of one rank against what the matrix products take."""
    parallel, training = config.parallel, config.training
    tensor, channels = parallel.tensor, shape.head_channels
    gathered = parallel.sequence_parallel and recipe == "blockwise"
    shards = parallel.context * (tensor if parallel.sequence_parallel else 1)
    step, wide = _STEP[recipe], _BLOCK if gathered else _STEP[recipe]
    tokens = training.micro_batch_size * training.seq_length
    queries = shape.num_attention_heads * channels
    keys_and_values = 2 * shape.query_groups * channels
    sides = (
        ("tokens of a micro-batch", tokens // shards, wide),
        ("hidden_size", shape.hidden_size, wide),
        ("query channels", queries // tensor, step),
        ("query, key and value channels", (queries + keys_and_values) // tensor, step),
        ("ffn_hidden_size", shape.ffn_width // tensor, step),
    )
    for what, size, multiple in sides:
        if size % multiple:
            raise ConfigError(
                f"{key}={recipe}: the {model}'s {what} on one rank, {size}, must be a multiple of "
                f"{multiple}; change the model, the batch or the layout, or set {key}=none"
            )
