"""What the doctor finds: each fault made here, and what it says about it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from data_tools.indexed_writer import IndexedWriter
from data_tools.manifest import hash_file
from taid_megatron import cli
from taid_megatron.checkpointing import manifest
from taid_megatron.config.engine import EngineAbilities
from taid_megatron.config.load import load
from taid_megatron.planning import doctor, stack
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
    assert "\x1b" not in table  # plain where it is no terminal
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


def test_a_damaged_manifest_fails(run, tmp_path) -> None:
    (tmp_path / "train.manifest.json").write_text("{")
    found = examined(run, tmp_path)[f"data {tmp_path / 'train'}"]
    assert found.state == "FAIL"
    assert "train.manifest.json" in found.found


@pytest.mark.parametrize(("capability", "fp8"), [((8, 0), "not on these GPUs"), ((9, 0), "yes")])
def test_gpus_are_told_with_what_they_can(monkeypatch, capability, fp8) -> None:
    """On made-up ones: a row says whether the oldest of them multiplies in FP8."""
    machine = EngineAbilities(
        has_cuda=True,
        has_transformer_engine=False,
        has_apex=False,
        gpu_count=2,
        compute_capability=capability,
    )
    monkeypatch.setattr(doctor, "_abilities", lambda: machine)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "H100")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    found = {finding.what: finding for finding in doctor._gpus(None)}
    assert found["GPUs"].found == "2 x H100"
    assert found["FP8"].found == fp8


def test_a_teacher_without_a_checkpoint_fails(run, tmp_path) -> None:
    (tmp_path / "teacher").mkdir()
    run["teacher"] = {"checkpoint": str(tmp_path / "teacher")}
    teacher = examined(run, tmp_path)["teacher"]
    assert teacher.state == "FAIL"
    assert teacher.found == f"{tmp_path / 'teacher'}: no checkpoint there"
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


def tokenizer(folder: Path, tokens: list[str], indent: int | None = None) -> Path:
    """A Hugging Face folder of the run's shape, with a tokenizer.json of these tokens."""
    folder.mkdir()
    vocabulary = {token: number for number, token in enumerate(tokens)}
    described = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(described, indent=indent))
    shape = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 50}
    shape |= {"model_type": "llama", "intermediate_size": 64, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps({**shape, "rms_norm_eps": 1e-5}))
    return folder


@pytest.mark.parametrize(
    ("change", "state", "part"),
    [
        (None, "ok", "the one that made the data"),
        ("spaces", "ok", "the same ids"),
        ("swapped", "FAIL", "2 ids differ, id 3 is '4'"),
    ],
)
def test_the_models_tokenizers_are_held_against_the_datas(
    run, tmp_path, change, state, part
) -> None:
    tokens = [str(number) for number in range(50)]
    student = tokenizer(tmp_path / "student", tokens)
    if change == "swapped":
        tokens[3], tokens[4] = tokens[4], tokens[3]
    teacher = tokenizer(tmp_path / "teacher", tokens, indent=1 if change == "spaces" else None)
    made_by(tmp_path / "train", hash_file(student / "tokenizer.json"))
    run["student"] = {"hf": str(student)}
    run |= {"teacher": {"hf": str(teacher)}, "loss": {"name": "taid"}}
    found = examined(run, tmp_path)
    assert found["student's tokenizer"].state == "ok"
    assert found["teacher's tokenizer"].state == state
    assert part in found["teacher's tokenizer"].found
    assert (found["teacher's tokenizer"].mend == "") == (state == "ok")


def made_by(prefix: Path, fingerprint: str) -> None:
    """Give the data a manifest that names its tokenizer."""
    described = {
        "sources": [],
        "tokenizer": {
            **{"kind": "tokenizer.json", "name": "tokenizer.json", "fingerprint": fingerprint},
            **{"vocab_size": 50, "eod_id": 0},
        },
        "options": {"text_column": "text", "append_eod": False},
        "dtype": "uint16",
        **{"documents": 1, "empty_documents": 0, "tokens": 40, "versions": {}},
        "outputs": [
            {"name": f"{prefix.name}.{ending}", "bytes": 0, "xxh3": "0" * 32}
            for ending in ("bin", "idx")
        ],
    }
    Path(f"{prefix}.manifest.json").write_text(json.dumps(described))


def test_a_teacher_of_another_tokenizer_fails(run, tmp_path) -> None:
    step = tmp_path / "teacher" / "checkpoints" / "step_00000007"
    step.mkdir(parents=True)
    saved = {"architecture": {"vocab_size": 50}, "tokenizer": "a" * 32}
    (step / "state.json").write_text(json.dumps(saved))
    manifest.write(step, manifest.record(step.iterdir()))
    made_by(tmp_path / "train", "b" * 32)
    run["teacher"] = {"checkpoint": str(tmp_path / "teacher")}
    found = examined(run, tmp_path)
    assert found["teacher's tokenizer"].state == "FAIL"
    assert "aaaa" in found["teacher's tokenizer"].found


def test_a_teacher_without_weights_fails(run, tmp_path) -> None:
    run |= {"teacher": {"architecture": run["student"]["architecture"]}, "loss": {"name": "taid"}}
    refused = examined(run, tmp_path)["configuration"]
    assert refused.state == "FAIL"
    assert "teacher.hf=FOLDER" in refused.mend
    run["teacher"]["init"] = {"from": "random"}
    assert examined(run, tmp_path)["configuration"].state == "ok"


def test_a_machine_without_cuda_is_examined_without_torch(run, tmp_path) -> None:
    """A health check runs it every few minutes, and torch alone takes two seconds to import."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    program = (
        "import sys; from taid_megatron.planning import stack; stack.gpu_platform = lambda: None; "
        "from taid_megatron.cli import main; codes = main(['doctor']), "
        f"main(['doctor', {str(tmp_path / 'run.yaml')!r}]); "
        "print(codes, {'torch', 'megatron'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "(0, 0) set()", done.stdout


def test_a_full_disk_fails(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert examined(run, tmp_path)["disk"].state == "FAIL"


def test_a_version_outside_what_was_run_together_fails(monkeypatch) -> None:
    pretend(monkeypatch, {"torch": "2.15.0", "psutil": None, "transformer-engine": "1.0"})
    found = {finding.what: finding for finding in doctor._versions()}
    assert (found["torch"].state, found["psutil"].state) == ("FAIL", "FAIL")
    assert "2.6" in found["torch"].mend
    assert found["transformer-engine"].state == "note"


def pretend(monkeypatch, versions: dict, cuda: str | None = None) -> None:
    """These versions instead of what is installed (None: missing), and a torch built for `cuda`."""
    real = stack.installed
    monkeypatch.setattr(
        stack, "installed", lambda name: versions[name] if name in versions else real(name)
    )
    monkeypatch.setattr(stack, "gpu_platform", lambda: cuda)


def test_two_generations_of_cuda_are_named(monkeypatch) -> None:
    versions = {"nvidia-nccl-cu13": None, "nvidia-nccl-cu12": "2.27.3"}
    pretend(monkeypatch, versions, cuda="13.0")
    found = {finding.what: finding for finding in doctor._versions()}
    assert found["nvidia-nccl-cu12"].state == "note"
    assert "CUDA 12, torch is built for 13.0" in found["nvidia-nccl-cu12"].found
    pretend(monkeypatch, versions, cuda="12.8")
    found = {finding.what: finding for finding in doctor._versions()}
    assert found["nvidia-nccl-cu12"].state == "ok"


def test_transformer_engine_beside_a_cpu_build_fails(monkeypatch) -> None:
    """megatron-core imports it where it is installed, and the import raises."""
    pretend(monkeypatch, {"transformer-engine": "2.10"})
    states = {finding.what: finding.state for finding in doctor._versions()}
    assert states["Transformer Engine"] == "FAIL"
    pretend(monkeypatch, {"transformer-engine": "2.10"}, cuda="13.0")
    assert "Transformer Engine" not in {finding.what for finding in doctor._versions()}


def test_the_native_kernel_is_needed_where_it_is_asked_for(run, tmp_path, monkeypatch) -> None:
    from taid_megatron.losses import native

    def refuse(required: bool):
        raise ValueError("no C++ compiler found")

    monkeypatch.setattr(native, "load", refuse)
    run["loss"]["kernel"] = "native"
    assert examined(run, tmp_path)["native kernel"].state == "FAIL"


def test_triton_is_needed_where_it_is_asked_for(run, tmp_path, monkeypatch) -> None:
    pretend(monkeypatch, {"triton": None})
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
