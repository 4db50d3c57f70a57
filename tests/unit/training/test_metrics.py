"""MetricsWriter: valid JSON lines whatever the numbers, one record a step over interruptions."""

import io
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from taid_megatron.config.errors import UserError
from taid_megatron.runtime import log
from taid_megatron.training import metrics
from taid_megatron.training.metrics import MetricsWriter, cut_off


def open_writer(folder, tensorboard=False, progress=False, total_steps=100, resume_step=0):
    return MetricsWriter(
        folder,
        tensorboard=tensorboard,
        progress=progress,
        total_steps=total_steps,
        resume_step=resume_step,
    )


def records_in(folder):
    text = (folder / "metrics.jsonl").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_one_object_per_line_readable_at_once(tmp_path):
    """A record is on disk when log returns, with the caller's keys and exact numbers."""
    writer = open_writer(tmp_path / "run")
    written = [
        {"step": 1, "loss": 1 / 3, "lr": 1e-300, "tokens": 2**40, "note": "ä\u2028\n", "ok": True},
        {"step": 2, "loss": 0.1 + 0.2, "grad_norm": None},
    ]
    for number, record in enumerate(written, start=1):
        writer.log(record)
        assert records_in(tmp_path / "run") == written[:number]
    writer.close()
    writer.close()


def test_non_finite_numbers_stay_json(tmp_path):
    writer = open_writer(tmp_path)
    writer.log({"step": 1, "loss": float("nan"), "kl": float("-inf"), "t": 0.5})
    writer.log({"step": 2, "loss": 1.0})
    writer.close()
    assert records_in(tmp_path) == [
        {"step": 1, "loss": None, "kl": None, "t": 0.5, "non_finite": ["loss", "kl"]},
        {"step": 2, "loss": 1.0},
    ]


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ({"loss": 1.0}, ValueError, "needs its step"),
        ({"step": 1.5, "loss": 1.0}, ValueError, "needs its step"),
        ({"step": 1, "loss": torch.tensor(1.0)}, TypeError, "loss is a Tensor"),
        ({"step": 1, "losses": [1.0]}, TypeError, "losses is a list"),
    ],
)
def test_refuses_what_is_no_record(tmp_path, record, error, message):
    writer = open_writer(tmp_path)
    with pytest.raises(error, match=message):
        writer.log(record)
    writer.log({"step": 1})
    writer.close()
    assert records_in(tmp_path) == [{"step": 1}]


def test_resume_cuts_what_was_logged_after_the_checkpoint(tmp_path):
    """Steps 1 to 5 logged, killed, resumed after 3: every step is there once."""
    writer = open_writer(tmp_path)
    for step in range(1, 6):
        writer.log({"step": step, "loss": 1.0})
    writer.log({"step": 3, "held_out_kl": 2.0})  # out of order: each record is judged by itself
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the process was killed here
    writer = open_writer(tmp_path, resume_step=3)
    writer.log({"step": 4, "loss": 2.0})
    writer.close()
    assert [(r["step"], r.get("loss")) for r in records_in(tmp_path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (3, None),
        (4, 2.0),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_unfinished_last_line_goes_even_if_nothing_else_does(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    cut_off(path, 10)
    assert path.read_text() == '{"step": 1}\n'


def test_nothing_to_cut_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_off(path, 0)
    assert not path.exists()
    path.write_text('{"step": 1}\n')
    before = path.stat().st_ino
    cut_off(path, 1)
    assert path.stat().st_ino == before


def test_interrupted_cut_keeps_the_old_file(tmp_path, monkeypatch):
    """Until the new file is complete and on disk the old one is untouched."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def power_cut(descriptor):
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(OSError, match="power cut"):
        cut_off(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    monkeypatch.undo()
    cut_off(path, 1)  # what the interrupted one left is in nobody's way
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"loss": 1.0}', "\x00\x00", '{"step": null}'])
def test_damaged_file_is_refused_by_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: .* move the file away"):
        open_writer(tmp_path, resume_step=1)


def scalars(folder, name):
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_tensorboard_scalars_and_resume(tmp_path):
    """Numbers become scalars at their step; after a resume the abandoned ones are hidden."""
    writer = open_writer(tmp_path, tensorboard=True)
    for step in range(1, 6):
        writer.log({"step": step, "loss": float(step), "tokens": 10 * step, "note": "text"})
    writer.close()
    writer = open_writer(tmp_path, tensorboard=True, resume_step=3)
    writer.log({"step": 4, "loss": 40.0, "tokens": 40, "grad_norm": None})
    writer.close()
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert scalars(tmp_path, "tokens")[-1] == (4, 40.0)
    accumulator = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert accumulator.Tags()["scalars"] == ["loss", "tokens"]


def test_without_a_terminal_and_tensorboard_there_are_plain_lines_alone(tmp_path):
    program = (
        "import sys; from taid_megatron.training.metrics import MetricsWriter\n"
        f"w = MetricsWriter({str(tmp_path)!r}, tensorboard=False, progress=True, total_steps=1)\n"
        "w.log({'step': 1, 'loss': 1.0}); w.close()\n"
        "assert 'rich' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "step 1/1  loss 1.0000\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


RECORD = {
    "step": 20,
    "objective": 1.3,
    "loss": 1.23451,
    "kl": 1.3,
    "t": 0.4119,
    "lr": 2.9e-3,
    "grad_norm": 0.7,
    "tokens": 8192,
    "tokens_per_second": 4321.2,
    "step_seconds": 0.39,
}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that time.monotonic tells; set them by clock[0] = ..."""
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_lines_where_there_is_no_terminal(tmp_path, capsys, clock):
    writer = open_writer(tmp_path, progress=True)
    clock[0] += 8
    writer.log(RECORD)
    clock[0] += 1
    writer.log({"step": 25, "held_out_kl": 0.5, "held_out_perplexity": 12.345, "loss": None})
    writer.log({"step": 100, "loss": float("nan")})
    writer.close()
    assert capsys.readouterr().out == (
        "step 20/100  loss 1.2345  kl 1.3000  t 0.412  lr 2.9e-03  4,321 tokens/s"
        "  time left 0:32\n"
        "step 25/100  held-out kl 0.5000  held-out perplexity 12.35  time left 0:27\n"
        "step 100/100  loss nan\n"
    )


def test_time_left_counts_from_the_resumed_step(tmp_path, capsys, clock):
    """10 steps in an hour, 81 to go: not 90 steps in an hour."""
    writer = open_writer(tmp_path, progress=True, total_steps=171, resume_step=80)
    writer.log({"step": 80, "loss": 1.0})
    clock[0] += 3600
    writer.log({"step": 90, "loss": 1.0})
    writer.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 80/171  loss 1.0000"
    assert second == "step 90/171  loss 1.0000  time left 8:06:00"


def test_no_progress_says_nothing(tmp_path, capsys):
    writer = open_writer(tmp_path, progress=False)
    writer.log(RECORD)
    writer.close()
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_on_a_terminal(tmp_path, monkeypatch, clock):
    """One line that is redrawn; what say() prints meanwhile goes above it, whole."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.delenv("NO_COLOR", raising=False)
    writer = open_writer(tmp_path, progress=True)
    clock[0] += 8
    writer.log(RECORD)
    log.say("checkpoint: [somewhere]")
    writer.close()
    assert sys.stdout is terminal
    shown = terminal.getvalue()
    assert "step 20/100" in shown
    assert "loss 1.2345  kl 1.3000  t 0.412  lr 2.9e-03  4,321 tokens/s  time left 0:32" in shown
    assert "checkpoint: [somewhere]" in shown
    assert "\x1b[" in shown


def test_rank_0_speaks_for_all(monkeypatch, capsys):
    """say: rank 0. Warnings: rank 0. Errors: every rank, with its number."""
    logger = log.get_logger()
    assert log.get_logger().handlers == logger.handlers
    monkeypatch.delenv("RANK", raising=False)
    log.say("hello")
    logger.info("noted")
    logger.warning("careful: %s", "this")
    assert capsys.readouterr() == ("hello\n", "info: noted\nwarning: careful: this\n")
    monkeypatch.setenv("RANK", "3")
    log.say("hello")
    logger.warning("careful")
    logger.error("broken")
    assert capsys.readouterr() == ("", "rank 3: error: broken\n")
    assert not logger.propagate


def test_rank_is_the_process_groups_once_it_runs(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert log.rank() == 3
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert log.rank() == 1


@pytest.mark.parametrize(("rank", "heard"), [("0", True), ("1", False)])
def test_quiet_megatron(rank, heard):
    """Remarks on missing extras and its own defaults go; Megatron's others stay, on rank 0."""
    program = """
import logging, sys, types, warnings
from taid_megatron.runtime.log import quiet_megatron
quiet_megatron()
quiet_megatron()
megatron = types.ModuleType("megatron.core.part")
exec('''
import logging, warnings
warnings.warn("Transformer Engine and Apex are not installed. Falling back to Torch optimizers.")
warnings.warn("Apex is not installed. Falling back to Torch Norm")
warnings.warn("full scope is deprecated. Use empty cuda_graph_scope")
warnings.warn("old path", DeprecationWarning)
warnings.warn("something else")
logging.getLogger("megatron.core.part").warning("logged")
logging.getLogger("megatron.core.part").error("failed")
''', megatron.__dict__)
warnings.warn("from another module")
"""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "RANK": rank, "SECRET_TOKEN": "hunter2"},
    )
    assert done.returncode == 0, done.stderr
    assert "Apex" not in done.stderr
    assert "full scope" not in done.stderr
    assert "old path" not in done.stderr
    assert ("something else" in done.stderr) is heard
    assert ("logged" in done.stderr) is heard
    assert "failed" in done.stderr
    assert "from another module" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    assert logging.getLogger("megatron").level == logging.NOTSET  # of this process: untouched
