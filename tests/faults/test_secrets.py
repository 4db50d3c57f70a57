"""Made-up secrets in environment and configuration: nothing shown or written has a byte of them."""

from __future__ import annotations

import os
import random
import string
from pathlib import Path

import pytest
import yaml

from taid_megatron import cli
from taid_megatron.training import loop

from ..distributed.ranks import run_ranks

SEED = 7


def _secrets() -> dict[str, str]:
    rng = random.Random(SEED)

    def letters(count: int) -> str:
        return "".join(rng.choices(string.ascii_letters + string.digits, k=count))

    return {
        "HF_TOKEN": "hf_" + letters(34),
        "WANDB_API_KEY": letters(40),
        "AWS_ACCESS_KEY_ID": "AKIA" + letters(16).upper(),
        "AWS_SECRET_ACCESS_KEY": letters(20) + "/+" + letters(18),
        "MY_PASSWORD": letters(12),
    }


def _main(rank: int, size: int, folder: Path, secrets: dict[str, str]) -> list[int]:
    """Every command with a secret wherever one can be put; the exit codes."""
    os.environ.update(secrets)
    url = f"https://me:{secrets['MY_PASSWORD']}@host/model"
    config, run = str(folder / "toy.yaml"), f"run.folder={folder / 'run'}"
    bad = folder / "bad.yaml"
    bad.write_text(f"student: {{hf: '{url}'\n{secrets['HF_TOKEN']}: [")
    unknown = folder / "unknown.yaml"
    unknown.write_text(yaml.safe_dump({"student": {secrets["HF_TOKEN"]: url}}))
    short = "training.stop_at=1"
    codes = [
        cli.main(["train", config, run, f"student.hf={url}"]),
        cli.main(["train", config, run, f"data.blend={secrets['AWS_SECRET_ACCESS_KEY']}"]),
        cli.main(["train", config, run, secrets["WANDB_API_KEY"]]),
        cli.main(["train", config, run, f"{secrets['HF_TOKEN']}.key=1"]),
        cli.main(["train", str(bad)]),
        cli.main(["train", str(unknown)]),
        cli.main(["train", url]),
        cli.main(["train", config, run, short]),
        cli.main(["doctor", config, run]),
        cli.main(["plan", config, "--gpus", "1"]),
        cli.main(["plan", config, f"--gpu={secrets['WANDB_API_KEY']}"]),
        cli.main(["report", str(folder / "run"), "--out", str(folder / "report.html")]),
        cli.main(["report", url]),
    ]
    loop._optimizer_step = _fail
    return [*codes, cli.main(["train", config, run])]


def _fail(*args: object) -> None:
    raise RuntimeError(
        f"could not reach https://x:{os.environ['MY_PASSWORD']}@host, "
        f"{os.environ['AWS_SECRET_ACCESS_KEY']}"
    )


def test_no_secret_is_shown_or_written(config, tmp_path, capfd: pytest.CaptureFixture[str]) -> None:
    secrets = _secrets()
    (tmp_path / "toy.yaml").write_text(config.read_text())
    (codes,) = run_ranks(1, _main, tmp_path, secrets)
    assert codes == [2] * 7 + [0, codes[8], 0, 2, 0, 2, 1]
    shown = "".join(capfd.readouterr())
    assert "could not reach https://***@host, ***" in shown
    assert "student.hf holds" in shown
    for given in ("bad.yaml", "unknown.yaml"):
        (tmp_path / given).unlink()
    texts = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any(name.endswith("run_status.json") for name in texts)
    assert any(name.endswith("report.html") for name in texts)
    texts["what was shown"] = shown.encode()
    leaks = [
        (name, where)
        for name, secret in secrets.items()
        for where, text in texts.items()
        # a part of it is one as well
        if any(secret[at : at + 8].encode() in text for at in range(0, len(secret) - 7))
    ]
    assert leaks == []
