"""What the doctor finds: each fault made here, and what it says about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from data_tools.indexed_writer import IndexedWriter
from taid_megatron import cli
from taid_megatron.checkpointing import manifest
from taid_megatron.config.load import load
from taid_megatron.planning import doctor
from taid_megatron.planning.network import Network


@pytest.fixture
def run(tmp_path: Path) -> dict:
    """A configuration of which everything is there."""
    with IndexedWriter(tmp_path / "train", vocab_size=50) as writer:
        writer.add_document(np.arange(40), name="0")
        writer.finish()
    return {
        "run": {"folder": str(tmp_path / "run")},
        "student": {
            "architecture": {
                "num_layers": 1,
                "hidden_size": 8,
                "num_attention_heads": 1,
                "vocab_size": 50,
            }
        },
        "loss": {"name": "cross_entropy"},
        "training": {"global_batch_size": 1, "seq_length": 8, "steps": 1},
        "optimizer": {"lr": 1e-3},
        "data": {"blend": str(tmp_path / "train"), "eod_id": 0},
    }


def examined(run: dict, tmp_path: Path) -> dict[str, doctor.Finding]:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return {finding.what: finding for finding in doctor.examine(load(path))}


def test_a_run_that_has_everything_passes(run, tmp_path, capsys) -> None:
    found = examined(run, tmp_path)
    assert doctor.passed([*found.values()]), found
    assert cli.main(["doctor", str(tmp_path / "run.yaml")]) == 0
    table = capsys.readouterr().out
    assert "megatron-core" in table
    assert "its values fit together" in table


def test_missing_data_fails_with_a_mend_and_exit_code_2(run, tmp_path, capsys) -> None:
    (tmp_path / "train.bin").unlink()
    found = examined(run, tmp_path)
    data = found[f"data {tmp_path / 'train'}"]
    assert data.state == "FAIL"
    assert "train.bin" in data.found
    assert found["configuration"].mend
    assert cli.main(["doctor", str(tmp_path / "run.yaml")]) == 2
    assert "FAIL" in capsys.readouterr().out


def test_cut_data_fails(run, tmp_path) -> None:
    whole = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "train.bin").write_bytes(whole[:-2])
    assert examined(run, tmp_path)[f"data {tmp_path / 'train'}"].state == "FAIL"


def test_a_teacher_without_a_checkpoint_fails(run, tmp_path) -> None:
    (tmp_path / "teacher").mkdir()
    run["teacher"] = {"checkpoint": str(tmp_path / "teacher")}
    teacher = examined(run, tmp_path)["teacher"]
    assert teacher.state == "FAIL"
    assert "step_*" in teacher.mend


def test_a_checkpoint_that_is_there_is_named(run, tmp_path) -> None:
    step = tmp_path / "teacher" / "checkpoints" / "step_00000007"
    step.mkdir(parents=True)
    (step / "state.json").write_text(json.dumps({"architecture": {"vocab_size": 50}}))
    manifest.write(step, manifest.record(step.iterdir()))
    run["teacher"] = {"checkpoint": str(tmp_path / "teacher")}
    teacher = examined(run, tmp_path)["teacher"]
    assert teacher.state == "ok"
    assert "step_00000007" in teacher.found


def test_a_full_disk_fails(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert examined(run, tmp_path)["disk"].state == "FAIL"


def test_a_version_outside_what_was_run_together_fails(monkeypatch) -> None:
    real = doctor._installed
    versions = {"torch": "2.15.0", "psutil": None, "transformer-engine": "1.0"}
    monkeypatch.setattr(
        doctor, "_installed", lambda name: versions[name] if name in versions else real(name)
    )
    found = {finding.what: finding for finding in doctor._versions()}
    assert (found["torch"].state, found["psutil"].state) == ("FAIL", "FAIL")
    assert "2.6" in found["torch"].mend
    assert found["transformer-engine"].state == "note"


def test_the_native_kernel_is_needed_where_it_is_asked_for(run, tmp_path, monkeypatch) -> None:
    from taid_megatron.losses import native

    def refuse(required: bool):
        raise ValueError("no C++ compiler found")

    monkeypatch.setattr(native, "load", refuse)
    run["loss"]["kernel"] = "native"
    assert examined(run, tmp_path)["native kernel"].state == "FAIL"


def test_triton_is_needed_where_it_is_asked_for(run, tmp_path, monkeypatch) -> None:
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: name != "triton" and real(name) or None)
    run["loss"]["kernel"] = "triton"
    assert examined(run, tmp_path)["Triton kernels"].state == "FAIL"


def test_a_slow_link_and_a_slow_rank_are_named() -> None:
    link = Network(0.1, [1.0, 1.1, 5.0, 0.9])
    assert link.slow_links() == [(2, 3, pytest.approx(5.0 / 1.05))]
    assert link.suspect() is None
    rank = Network(0.1, [1.0, 4.0, 5.0, 0.9, 1.0, 1.1])
    assert rank.suspect() == 2
    assert Network(0.1, [1.0, 1.1, 0.9]).slow_links() == []


def test_one_rank_has_no_network(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not doctor.passed(doctor.network())
