"""A preset's parts: what they weigh is said or refused, and where they lie is no pattern."""

import gzip
import json
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_tools import cli
from data_tools.manifest import DataError
from data_tools.prepare import Settings
from data_tools.presets import prepare_preset
from data_tools.sources import find_sources

PARTS = ("cosmopedia-v2", "fineweb-edu-dedup", "python-edu")


@pytest.fixture
def smollm(tmp_path: Path) -> Path:
    """The data set in miniature, in a folder whose name would be a pattern."""
    root = tmp_path / "sm [v1]*?"
    for part in PARTS[:2]:
        (root / part).mkdir(parents=True)
        pq.write_table(pa.table({"text": [part] * 8}), root / part / "0.parquet")
    (root / "python-edu/text").mkdir(parents=True)
    text = gzip.compress(b'{"text": "print(1)"}\n')
    (root / "python-edu/text/part-00000.jsonl.gz").write_bytes(text)
    # What the name stands for as a pattern.
    (tmp_path / "sm v.." / PARTS[0]).mkdir(parents=True)
    pq.write_table(pa.table({"text": ["a"] * 9}), tmp_path / "sm v.." / PARTS[0] / "0.parquet")
    return root


def test_a_folders_name_is_no_pattern(smollm: Path, model_path: Path, tmp_path: Path) -> None:
    made = prepare_preset(
        "smollm-corpus", [smollm], model_path, tmp_path / "o", Settings(workers=1)
    )
    assert [manifest.documents for manifest in made.values()] == [8, 8, 1]
    (smollm / "python-edu/text/part-00000.jsonl.gz").unlink()
    pq.write_table(pa.table({"blob_id": ["aa"]}), smollm / "python-edu/ids.parquet")
    with pytest.raises(DataError, match="hold ids only") as error:
        prepare_preset("smollm-corpus", [smollm], model_path, tmp_path / "p", Settings())
    command = shlex.split(str(error.value).partition("ids only: ")[2])
    assert [source.path for source in find_sources([command[2]])] == [
        smollm / "python-edu/ids.parquet"
    ]


def test_hidden_files_are_no_part(smollm: Path, model_path: Path, tmp_path: Path) -> None:
    file = smollm / "fineweb-edu-dedup/0.parquet"
    file.rename(file.with_name(".0.parquet"))
    with pytest.raises(DataError, match=r"fineweb-edu-dedup/\*.parquet: no such file; check the f"):
        prepare_preset("smollm-corpus", [smollm], model_path, tmp_path / "o", Settings())


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        (["cosmopedia-v2=0"], "cosmopedia-v2=0: no weight; give a number above 0, or leave the"),
        (["cosmopedia-v2=0", "python-edu=1"], "cosmopedia-v2=0: no weight"),
        (["cosmopedia-v2=-1"], "cosmopedia-v2=-1: no weight"),
        (["cosmopedia-v2=nan"], "cosmopedia-v2=nan: no weight"),
        (["cosmopedia-v2=1", "python-edu=inf"], "python-edu=inf: no weight"),
        (["cosmopedia-v2"], "cosmopedia-v2: no weight; give cosmopedia-v2=WEIGHT"),
        (["cosmopedia-v2=1", "python-edu"], "python-edu: no weight; give python-edu=WEIGHT"),
        (["web=0"], "no part web in smollm-corpus; it has cosmopedia-v2, fineweb-edu-dedup"),
        (["web", "python-edu=1"], "no part web in smollm-corpus"),
        (["cosmopedia-v2="], "'' is no number"),
    ],
)
def test_a_weight_that_is_none_is_refused(
    smollm: Path,
    model_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    weights: list[str],
    fault: str,
) -> None:
    out = tmp_path / "out"
    command = ["prepare", str(smollm), "--preset", "smollm-corpus", "--tokenizer", str(model_path)]
    command += ["--out", str(out), *(f"--weight={weight}" for weight in weights)]
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n"), out.exists()) == (2, 1, False)
    assert fault in error


def test_parts_that_are_not_named_are_left_out(
    smollm: Path, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prepare", str(smollm), "--preset", "smollm-corpus", "--tokenizer", str(model_path)]
    command += ["--out", str(tmp_path / "out"), "--weight=python-edu=0.5", "--json"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    made = json.loads(capsys.readouterr().out)
    assert (stopped.value.code, list(made)) == (0, [str(tmp_path / "out/python-edu")])
    blend = yaml.safe_load((tmp_path / "out/blend.yaml").read_text())
    assert [part["weight"] for part in blend] == [0.5]
