"""Exit codes and what stands on stderr: one line for what the user can mend."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import taid_megatron
from data_tools.manifest import DataError
from taid_megatron import cli, manual
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
        (["trian"], ["No such command 'trian'. Did you mean 'train'? see taid-megatron --help"]),
        (["train", "{run}", "--fast"], ["No such option: --fast; see taid-megatron train --help"]),
        (["quickstart", "--fres"], ["--fres. Did you mean --fresh? see"]),
        (["train", "{run}", "optimiser.lr=1"], ["did you mean optimizer?"]),
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


def test_version_names_the_whole_stack_and_what_is_missing_without_importing_it(monkeypatch):
    done = python(
        "import sys; from taid_megatron.cli import main; from taid_megatron.planning import stack\n"
        "real = stack.installed; stack.installed = lambda name: name != 'apex' and real(name)\n"
        "code = main(['--version'])\n"
        "print(code, {'torch', 'megatron', 'numpy', 'transformers'} & set(sys.modules))"
    )
    *lines, last = done.stdout.splitlines()
    found = dict(line.split(maxsplit=1) for line in lines if len(line.split()) == 2)
    assert last == "0 set()"
    assert found["taid-megatron"] == taid_megatron.__version__
    assert found["torch"] == metadata.version("torch")
    assert found["megatron-core"] == metadata.version("megatron-core")
    assert any(line.split() == ["Apex", "not", "installed"] for line in lines)


COMMANDS = sorted(info.name or info.callback.__name__ for info in cli.app.registered_commands)


def test_every_command_has_a_manual_with_examples_plain_when_piped(capsys):
    for name in ("", *COMMANDS):
        assert cli.main([name, "--help"] if name else ["--help"]) == 0
        text = capsys.readouterr().out
        assert f"Usage: taid-megatron {name}".rstrip() in text
        assert "\x1b" not in text
        if name:
            lines = text.partition("Examples:\n")[2].splitlines()
            assert lines, name
            assert all(f" {name} " in line or line.endswith(f" {name}") for line in lines), lines
        else:
            assert all(f"  {command} " in text for command in COMMANDS)
            assert "..." not in text.partition("Commands:")[2].partition("Where")[0]


def test_the_examples_are_command_lines_that_parse(capsys, monkeypatch):
    """Options of the manual exist: each line is parsed, its command replaced."""
    seen = []
    for info in cli.app.registered_commands:
        monkeypatch.setattr(info, "callback", recorded(info.callback, seen))
    lines = [line for lines in manual._EXAMPLES.values() for line in lines]
    for line in lines:
        if "launch/torchrun.sh" not in line:
            words = line.replace("-m taid_megatron", "taid-megatron").split("taid-megatron ")[1]
            assert cli.main(words.split()) == 0, (line, capsys.readouterr().err)
    assert set(COMMANDS) <= set(seen)


def recorded(callback, seen):
    @functools.wraps(callback)
    def call(**options):
        seen.append(callback.__name__.rstrip("_"))
        return 0

    return call


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("taid-megatron tr", {"train"}),
        ("taid-megatron quickstart --fr", {"--fresh"}),
        ("taid-megatron train run.yaml optimizer.warm", {"optimizer.warmup_steps="}),
    ],
)
def test_a_shell_completes_commands_options_and_keys(words, expected):
    count = len(words.split()) - 1
    asked = {"_TAID_MEGATRON_COMPLETE": "complete_bash", "COMP_WORDS": words}
    done = command(**asked, COMP_CWORD=str(count))
    assert set(done.stdout.split()) == expected, done.stderr


def test_bash_takes_the_completion_script():
    script = (
        f'eval "$({shlex.quote(sys.executable)} -m taid_megatron --show-completion)"; complete -p'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("taid-megatron\n"), done.stdout + done.stderr


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
