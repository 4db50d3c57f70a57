"""Exit codes and what stands on stderr: one line for what the user can mend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import taid_megatron
from data_tools.manifest import DataError
from taid_megatron import cli
from taid_megatron.config.errors import UserError

RUN = """
run: {folder: run}
student:
  architecture: {num_layers: 1, hidden_size: 8, num_attention_heads: 1, vocab_size: 10}
training: {global_batch_size: 1, seq_length: 8, steps: 1}
optimizer: {lr: 1e-3}
data: {blend: corpus}
"""


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "taid_megatron", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


@pytest.fixture
def trainer(monkeypatch):
    """A stand-in for the training loop: replace its `run`."""
    loop: Any = ModuleType("taid_megatron.training.loop")
    monkeypatch.setitem(sys.modules, loop.__name__, loop)
    return loop


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "none.yaml"], ["none.yaml: no such file"]),
        (["train", "{run}", "training.seq_len=5"], ["training.seq_len", "training.seq_length?"]),
        (["train", "{run}", "seq_length"], ["override 'seq_length'", "section.key=value"]),
        (["train"], ["Missing argument 'CONFIG'", "--help"]),
        (["trian"], ["No such command 'trian'", "--help"]),
        (["train", "{run}", "--fast"], ["No such option", "--fast", "--help"]),
        ([], ["Missing command", "--help"]),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_2(run_yaml: Path, arguments, parts):
    done = command(*(argument.format(run=run_yaml) for argument in arguments))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("taid-megatron: ")
    assert all(part in done.stderr for part in parts), done.stderr


def test_only_the_first_rank_says_it_and_all_exit_2():
    others = command("train", "none.yaml", RANK="1")
    assert (others.returncode, others.stderr) == (2, "")
    first = command("train", "none.yaml", RANK="0")
    assert (first.returncode, len(first.stderr.splitlines())) == (2, 1)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_bad_configuration_is_refused_fast_and_without_torch(run_yaml: Path):
    """Under a second of processor time, on a login node too: nothing heavy is imported before."""
    done = python(
        "import sys, time; from taid_megatron.cli import main; "
        f"print(main(['train', {str(run_yaml)!r}, 'training.steps=none'])); "
        "print({'torch', 'megatron', 'numpy', 'transformers'} & set(sys.modules)); "
        "print(time.process_time())"
    )
    code, heavy, seconds = done.stdout.splitlines()
    assert (code, heavy) == ("2", "set()")
    assert float(seconds) < 1


def test_version_and_help_exit_0():
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"taid-megatron {taid_megatron.__version__}\n")
    help_text = command("--help")
    assert help_text.returncode == 0
    assert all(name in help_text.stdout for name in ("train", "quickstart"))


@pytest.mark.parametrize("code", [0, 75])
def test_train_returns_the_loops_exit_code(trainer, run_yaml: Path, code: int):
    seen = []
    trainer.run = lambda config: seen.append(config) or code
    assert cli.main(["train", str(run_yaml), "training.seq_length=16"]) == code
    assert seen[0].training.seq_length == 16


def test_quickstart_passes_its_options(monkeypatch):
    from taid_megatron import quickstart

    seen = []
    monkeypatch.setattr(quickstart, "run", lambda **options: seen.append(options) or 0)
    for line in ([], ["--folder", "there", "--fresh", "--seeds", "3"], ["--long"]):
        assert cli.main(["quickstart", *line]) == 0
    assert seen == [
        {"folder": Path("runs/quickstart"), "fresh": False, "sizes": quickstart.Sizes()},
        {"folder": Path("there"), "fresh": True, "sizes": quickstart.Sizes(seeds=3)},
        {"folder": Path("runs/quickstart"), "fresh": False, "sizes": quickstart.LONG},
    ]
    assert cli.main(["quickstart", "--seeds", "0"]) == 2


@pytest.mark.parametrize("kind", [UserError, DataError])
def test_user_and_data_errors_of_a_run_are_one_line(trainer, run_yaml, capsys, kind):
    def run(config: object) -> int:
        raise kind("corpus.bin: too short;\ngive more")

    trainer.run = run
    assert cli.main(["train", str(run_yaml)]) == 2
    assert capsys.readouterr().err == "taid-megatron: corpus.bin: too short; give more\n"


def test_other_failures_keep_their_traceback_and_exit_1(run_yaml: Path):
    done = python(
        "import sys, types\n"
        "loop = sys.modules['taid_megatron.training.loop'] = types.ModuleType('loop')\n"
        "def run(config): raise RuntimeError('the core melted')\n"
        "loop.run = run\n"
        "from taid_megatron.cli import main\n"
        f"sys.exit(main(['train', {str(run_yaml)!r}]))\n"
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("RuntimeError: the core melted\n")


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, typer.Abort])
def test_an_interrupt_from_the_keyboard_exits_130(trainer, run_yaml: Path, capsys, interrupt):
    """Whatever typer's version makes of it."""

    def run(config: object) -> int:
        raise interrupt

    trainer.run = run
    assert cli.main(["train", str(run_yaml)]) == 130
    assert "Traceback" not in capsys.readouterr().err
