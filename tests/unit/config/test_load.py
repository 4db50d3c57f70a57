from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from taid_megatron.config.errors import ConfigError
from taid_megatron.config.load import load
from taid_megatron.config.schema import Config

from .configs import values


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values()))
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The one line that load refuses with."""
    with pytest.raises(ConfigError) as refused:
        load(path, overrides)
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    return message


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_a_file(run_yaml: Path):
    config = load(run_yaml)
    assert config == Config.model_validate(values())
    assert config.training.seq_length == 32


def test_overrides_apply_in_order_and_may_open_sections(run_yaml: Path):
    config = load(
        run_yaml,
        ["training.seq_length=64", "training.seq_length=128", "parallel.tensor=2", "teacher="],
    )
    assert (config.training.seq_length, config.parallel.tensor) == (128, 2)
    assert config.teacher is None


def test_an_override_replaces_lists_and_sections_whole(run_yaml: Path):
    config = load(run_yaml, ["data.blend=[a, {prefix: b, weight: 3}]", "taid={alpha: 0.1}"])
    assert [(str(part.prefix), part.weight) for part in config.data.blend] == [("a", 1), ("b", 3)]
    assert config.taid.alpha == 0.1


def test_an_override_of_an_aliased_section_leaves_its_twin_alone(tmp_path: Path):
    tree = values()
    shape = yaml.safe_dump(tree.pop("student")["architecture"], default_flow_style=True).strip()
    del tree["teacher"]
    text = f"student: {{architecture: &shape {shape}}}\nteacher: {{architecture: *shape}}\n"
    path = written(tmp_path / "run.yaml", text + yaml.safe_dump(tree))
    config = load(path, ["student.architecture.num_layers=2"])
    assert config.student.architecture.num_layers == 2
    assert config.teacher.architecture.num_layers == 8


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("5e-4", 5e-4), ("1E+2", 100.0), ("2", 2.0), (".5", 0.5), ("1.e1", 10.0)],
)
def test_numbers_with_exponents_are_numbers(run_yaml: Path, text: str, value: float):
    """YAML 1.1 reads 1e-3 as text: in the file and in overrides it is a number here."""
    assert load(run_yaml, [f"optimizer.lr={text}"]).optimizer.lr == value
    in_file = run_yaml.read_text().replace("lr: 0.001", f"lr: {text}")
    assert f"lr: {text}" in in_file
    assert load(written(run_yaml, in_file)).optimizer.lr == value


@pytest.mark.parametrize("name", ["2024-01-01", "012", "12:30", "0x1f", "on", "no", "1.2.3", "e3"])
def test_text_that_yaml_1_1_reads_as_something_else_is_text(run_yaml: Path, name: str):
    assert load(run_yaml, [f"run.folder={name}"]).run.folder == Path(name)


def test_large_counts_can_be_written_readably(run_yaml: Path):
    steps = "training.steps=null"
    assert load(run_yaml, [steps, "training.tokens=1_000_000"]).training.tokens == 10**6
    assert load(run_yaml, [steps, "training.tokens=1e9"]).training.tokens == 10**9


def test_home_is_expanded_and_relative_paths_stay(run_yaml: Path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load(run_yaml, ["run.folder=~/r", "data.blend=[~/a, b]"])
    assert config.run.folder == Path("/home/me/r")
    assert [part.prefix for part in config.data.blend] == [Path("/home/me/a"), Path("b")]
    assert "nobody-here" in refusal(run_yaml, "run.folder=~nobody-here/x")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.seq_len=5", ["training.seq_len ", "did you mean training.seq_length?", "steps"]),
        ("training.lr=5", ["training.lr ", "did you mean optimizer.lr?"]),
        ("trainin.steps=5", ["trainin ", "did you mean training?", "optimizer, data"]),
        (
            "student.architecture.layers=5",
            ["student.architecture.layers ", "student.architecture: num_layers"],
        ),
        (
            "data.blend=[{prefix: a, wieght: 1}]",
            ["data.blend.0.wieght", "did you mean data.blend.0.weight?"],
        ),
        ("zzz=5", ["zzz is not a known key; known sections: run, student"]),
    ],
)
def test_unknown_keys_name_what_may_have_been_meant(run_yaml: Path, override: str, parts):
    message = refusal(run_yaml, override)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.seq_length=-5", ["is -5", "a number > 0", "Tokens per sequence"]),
        ("training.seq_length=long", ["is 'long'", "a whole number"]),
        ("training.seq_length=1.5", ["is 1.5", "a whole number"]),
        ("training.seq_length=", ["is null", "a whole number"]),
        ("taid.t_start=1.5", ["is 1.5", "a number <= 1"]),
        ("taid.beta=1", ["is 1", "a number < 1"]),
        ("run.seed=-1", ["is -1", "a number >= 0"]),
        ("optimizer.lr=.inf", ["is inf", "a number"]),
        ("optimizer.lr=.nan", ["is nan", "a number"]),
        ("optimizer.lr=1e400", ["is inf", "a number"]),
        ("optimizer.decay=cosin", ["is 'cosin'", "'cosine', 'wsd'"]),
        ("logging.tensorboard=maybe", ["is 'maybe'", "true or false"]),
        ("run.folder=2024", ["is 2024", "a path", "quotes"]),
        ("training=5", ["is 5", "a section"]),
        ("student.layers_per_stage=3", ["is 3", "a list"]),
        ("logging.profile_steps=[1, 2, 3]", ["is [1, 2, 3]", "at most 2 values"]),
    ],
)
def test_wrong_values_name_key_value_expectation_and_mend(run_yaml: Path, override: str, parts):
    key = override.partition("=")[0]
    message = refusal(run_yaml, override)
    assert message.startswith(f"{key} is ")
    assert message.endswith(f"change the override of {key}")
    assert all(part in message for part in parts), message


def test_the_mend_names_the_file_where_the_value_stands_there(run_yaml: Path):
    run_yaml.write_text(yaml.safe_dump(values(training__seq_length=-5)))
    message = refusal(run_yaml, "training.steps=3")
    assert message.endswith(f"change training.seq_length in {run_yaml}")


@pytest.mark.parametrize("key", ["run.seed", "optimizer.lr", "student.layers_per_stage"])
def test_truth_values_are_not_numbers(run_yaml: Path, key: str):
    value = "[3, true]" if key.endswith("stage") else "true"
    message = refusal(run_yaml, f"{key}={value}")
    assert message.startswith(key)
    assert "is true, expected a number" in message


def test_sections_that_contradict_themselves_are_named(run_yaml: Path):
    message = refusal(run_yaml, "training.tokens=5")
    assert message.startswith("training: give either 'steps' or 'tokens'")
    assert "null" in message
    assert refusal(run_yaml, "taid.t_end=0.1").startswith("taid: t_start 0.4 is above t_end 0.1")


def test_missing_keys_say_what_they_are_and_how_to_give_them(run_yaml: Path):
    message = refusal(run_yaml, "optimizer={}")
    assert message.startswith("optimizer.lr is missing (Peak learning rate)")
    assert f"add it to {run_yaml} or give optimizer.lr=VALUE" in message
    whole = refusal(written(run_yaml, ""))
    assert whole.startswith("run is missing; add the section to")
    assert "with at least folder" in whole
    assert whole.endswith("(4 more like this)")


def test_a_missing_value_of_a_list_is_not_given_by_its_number(run_yaml: Path):
    message = refusal(run_yaml, "logging.profile_steps=[1]")
    assert message.startswith("logging.profile_steps.1 is missing")
    assert message.endswith("give all values of the list")


def test_long_values_are_cut(run_yaml: Path):
    for override in (f"training.seq_length={'x' * 5000}", f"{'x' * 5000}"):
        message = refusal(run_yaml, override)
        assert "xxxxx..." in message
        assert len(message) < 300
    exactly = "x" * 78
    assert f"'{exactly}'" in refusal(run_yaml, f"training.seq_length={exactly}")
    assert f"'{exactly}x'" not in refusal(run_yaml, f"training.seq_length={exactly}x")


def test_a_mistyped_required_key_is_reported_as_mistyped(run_yaml: Path):
    message = refusal(run_yaml, "optimizer={rl: 1}")
    assert message.startswith("optimizer.rl is not a known key")
    assert message.endswith("(1 more like this)")


@pytest.mark.parametrize(
    "override", ["steps", "=5", "training..steps=5", ".steps=5", "steps.=5", " training.steps=5"]
)
def test_overrides_without_key_or_equals_are_refused(run_yaml: Path, override: str):
    message = refusal(run_yaml, override)
    assert message.startswith(f"override '{override}': expected section.key=value")
    assert "optimizer.lr=1e-3" in message


@pytest.mark.parametrize(
    ("override", "above"),
    [("data.blend.0.weight=2", "data.blend"), ("run.folder.x=2", "run.folder")],
)
def test_overrides_below_a_value_are_refused(run_yaml: Path, override: str, above: str):
    message = refusal(run_yaml, override)
    assert f"{above} is " in message
    assert f"override it whole, {above}=VALUE" in message


def test_malformed_overrides_are_refused(run_yaml: Path):
    assert refusal(run_yaml, "data.blend=[a").startswith("override 'data.blend=[a', line 1: malf")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("run: {folder: a}\ntraining: [\n", ["line 3", "malformed YAML"]),
        ("run:\n  folder: a\n  folder: b\n", ["line 3", "'folder' is given twice", "keep one"]),
        ("run: {}\nrun: {}\n", ["line 2", "'run' is given twice"]),
        ("run:\n\tfolder: a\n", ["line 2", "malformed YAML"]),
        ("a: 1\n---\nb: 2\n", ["line 2", "single document"]),
        ("1: 2\n", ["line 1", "not a plain name"]),
        ("[a]: 2\n", ["line 1", "not a plain name"]),
        ("run: !!python/object/apply:os.system [id]\n", ["line 1", "constructor"]),
        ("run: {seed: !!int x}\n", ["malformed value", "'x'"]),
        ("run: " + "[" * 600, ["malformed value", "write it plainly"]),
        ("- 1\n", ["holds a list", "expected sections"]),
        ("just words\n", ["holds a str", "expected sections"]),
    ],
)
def test_malformed_files_are_refused_with_the_line(tmp_path: Path, text: str, parts):
    path = written(tmp_path / "bad.yaml", text)
    message = refusal(path)
    assert message.startswith(str(path))
    assert all(part in message for part in parts), message


def test_merged_mappings_are_no_duplicates(tmp_path: Path):
    """`<<` may repeat keys that it overrides, whatever order the loader builds mappings in."""
    tree = values()
    shape = yaml.safe_dump(tree["student"].pop("architecture"), default_flow_style=True).strip()
    del tree["student"], tree["teacher"]
    text = (
        f"student:\n  architecture: &base {shape}\n"
        "teacher: {architecture: {<<: *base, num_layers: 3}}\n"
    )
    config = load(written(tmp_path / "run.yaml", text + yaml.safe_dump(tree)))
    assert config.teacher.architecture.num_layers == 3
    assert config.teacher.architecture.hidden_size == 64


def test_unreadable_files_are_refused(tmp_path: Path):
    assert "no such file" in refusal(tmp_path / "none.yaml")
    assert "Is a directory" in refusal(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refusal(binary)
    assert "malformed YAML" in refusal(written(tmp_path / "zero.yaml", "a: \x00"))
