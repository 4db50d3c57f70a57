"""What goes with the weights in a Hugging Face folder: tokenizer, generation settings, special ids.

They are kept beside a checkpoint, in a folder `hf`, as they came from the source, and written into
an export, always with a tokenizer.json. One is made from a sentencepiece model where there is none:
transformers 5 does not load a folder with such a model alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from taid_megatron.config.errors import UserError
from taid_megatron.conversion.sentencepiece_json import convert

FOLDER = "hf"
_TOKENIZER = "tokenizer.json"
_GENERATION = "generation_config.json"
_TOKENIZER_FILES = (
    _TOKENIZER,
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def keep(source: Path, target: Path) -> None:
    """Copy what is no weight from a Hugging Face folder, or another `hf`, to a checkpoint's."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (*_TOKENIZER_FILES, _GENERATION, "config.json"):
        if (source / name).is_file() and source != target:
            shutil.copyfile(source / name, target / name)


def run_folder(checkpoint: Path) -> Path | None:
    """The folder of the run that a step_* folder is of; None for an imported one."""
    beside = checkpoint.parent
    return beside.parent if beside.name == "checkpoints" else None


def find(checkpoint: Path) -> Path | None:
    """The `hf` folder of a checkpoint: in it, beside it, or in its run's folder."""
    folders = (checkpoint, checkpoint.parent, run_folder(checkpoint))
    found = (folder / FOLDER for folder in folders if folder is not None)
    return next((folder for folder in found if folder.is_dir()), None)


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer.json can be had from there."""
    return any((folder / name).is_file() for name in (_TOKENIZER, "tokenizer.model"))


def load_tokenizer(source: Path) -> Any:
    """The `tokenizers` package's tokenizer of a folder, a tokenizer.json or a .model.

    Raises UserError where there is none.
    """
    import tokenizers

    with tempfile.TemporaryDirectory() as folder:
        _write_tokenizer(source, Path(folder))
        path = Path(folder) / _TOKENIZER
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise UserError(f"{source}: not a tokenizer ({error}); give another") from None


def write_companions(source: Path, target: Path, vocab_size: int) -> dict[str, Any]:
    """Write tokenizer and generation settings into a folder.

    source: a folder, a tokenizer.json or a sentencepiece .model. Returns the special ids for
    config.json. Raises UserError where there is no tokenizer, or one with ids that the model lacks.
    """
    _write_tokenizer(source, target)
    folder = source if source.is_dir() else None
    _check_ids(target / _TOKENIZER, vocab_size)
    ids = _special_ids(folder, target)
    generation = _read(folder / _GENERATION) if folder else {}
    known = {name: value for name, value in ids.items() if value is not None}
    _write(target / _GENERATION, generation or {"_from_model_config": True, **known})
    return ids


def _write_tokenizer(source: Path, target: Path) -> None:
    """A tokenizer.json in `target`, and what else the source has beside it."""
    if source.is_dir():
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
    elif source.suffix == ".json" and source.is_file():
        shutil.copyfile(source, target / _TOKENIZER)
    if (target / _TOKENIZER).is_file():
        return
    model = source / "tokenizer.model" if source.is_dir() else source
    if not model.is_file() or model.suffix != ".model":
        raise UserError(
            f"{source}: no tokenizer there (tokenizer.json or tokenizer.model); give --tokenizer"
        )
    settings = convert(model, target / _TOKENIZER)
    if not (target / "tokenizer_config.json").is_file():
        _write(target / "tokenizer_config.json", settings)


def _check_ids(path: Path, vocab_size: int) -> None:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise UserError(f"{path.name}: not a tokenizer ({error}); give another") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= vocab_size:
        raise UserError(
            f"{path.name}: has token id {largest}, the model knows {vocab_size} ids; give the "
            "model's own tokenizer"
        )


def _special_ids(folder: Path | None, target: Path) -> dict[str, Any]:
    """bos, eos and pad as the source's config.json has them, else as its tokenizer names them."""
    config = _read(folder / "config.json") if folder else {}
    if any(config.get(name) is not None for name in _SPECIAL_IDS):
        return {name: config.get(name) for name in _SPECIAL_IDS}
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(target / _TOKENIZER))
    settings = _read(target / "tokenizer_config.json")
    ids: dict[str, Any] = {}
    for name in _SPECIAL_IDS:
        token = settings.get(name.removesuffix("_id"))
        token = token.get("content") if isinstance(token, dict) else token
        ids[name] = tokenizer.token_to_id(token) if isinstance(token, str) else None
    return ids


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); get the file anew") from None
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
