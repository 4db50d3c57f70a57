"""`taid-megatron report`: what it reads, what it refuses, a page that stands alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from taid_megatron import cli
from taid_megatron.reporting import compare, plots
from taid_megatron.reporting.compare import events_table, pictures, report, summary_table
from taid_megatron.reporting.page import Table
from taid_megatron.reporting.plots import bars
from taid_megatron.reporting.runs import load


def make_run(folder: Path, loss: str = "taid", steps: int = 4) -> Path:
    folder.mkdir(parents=True)
    config = {
        "loss": {"name": loss},
        "taid": {"t_start": 0.2, "t_end": 1.0},
        "training": {"steps": 8, "tokens": None, "global_batch_size": 2, "seq_length": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records = [
        {"step": n, "loss": 2.0 / n, "kl": 3.0 / n, "lr": 1e-3, "grad_norm": 1.0}
        | {"tokens_per_second": 100.0}
        | ({"t": 0.2 + 0.1 * n} if loss == "taid" else {})
        for n in range(1, steps + 1)
    ]
    records.append({"step": steps, "held_out_kl": 0.75, "held_out_perplexity": 12.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_page_markdown_and_json(tmp_path):
    runs = [make_run(tmp_path / "a" / "student"), make_run(tmp_path / "b" / "student", "tvd", 3)]
    paths = report(runs, tmp_path / "out" / "page.html")
    html, markdown, values = (path.read_text() for path in paths)
    assert html.count("data:image/png;base64,") == 8  # seven figures and t
    assert "http" not in html
    assert "| a/student | taid | 4 | 0.5000 | 0.7500 | 0.7500 | 12.50 |  |  | 100 |" in markdown
    assert "| b/student | tvd | 3 |" in markdown
    assert [run["held_out_kl"] for run in json.loads(values)] == [0.75, 0.75]


def test_a_figure_that_no_run_has_gets_no_picture(tmp_path):
    run = load(make_run(tmp_path / "run", "forward_kl"))
    captions = " ".join(picture.caption for picture in pictures([run]))
    assert "Forward KL on the training batches" in captions
    assert "share in the target's logits" not in captions
    assert "20% of the vocabulary" not in captions  # it was never evaluated
    (run.folder / "evaluation").mkdir()
    masses = {"head_mass": 0.25, "tail_mass": 0.0125, "teacher_head_mass": 0.5}
    (run.folder / "evaluation" / "evaluation.json").write_text(json.dumps({"held_out": masses}))
    captions = " ".join(picture.caption for picture in pictures([load(run.folder)]))
    assert "20% of the vocabulary" in captions
    assert "| 25.0% | 1.25e-02 |" in summary_table([load(run.folder)]).markdown()


def test_what_happened_to_a_run(tmp_path):
    folder = make_run(tmp_path / "run")
    happened = [{"step": n, "skipped": "loss"} for n in range(5, 12)]
    happened += [{"step": 12, "resumed_from": "step_00000012"}]
    happened += [{"step": 12, "resumed_from": "step_00000012"}]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in happened)
    (folder / "run_status.json").write_text('{"state": "failed", "error": "disk full"}')
    row = events_table([load(folder)]).markdown().splitlines()[-1]
    assert "| failed: disk full | 7: step 5, 6, 7, 8, 9, 2 more | none |" in row
    assert "| 2: step 12, 12 |" in row
    assert "state | not known" not in row
    values = json.loads(report([folder], tmp_path / "page.html")[2].read_text())[0]
    assert (values["state"], len(values["skipped_steps"]), values["restarts"]) == (
        *("failed", 7),
        [12, 12],
    )


def test_a_run_has_one_colour_in_all_pictures(tmp_path, monkeypatch):
    """Also where only the second of two runs has the figure."""
    drawn = {}
    monkeypatch.setattr(
        compare, "lines", lambda title, x, y, curves: drawn.setdefault(title, curves) and b""
    )
    runs = [load(make_run(tmp_path / "a", "tvd")), load(make_run(tmp_path / "b"))]
    pictures(runs)
    colours = {line.colour for curves in drawn.values() for line in curves if line.label == "b"}
    assert len(colours) == 1
    assert len(drawn["Interpolation t"]) == 2


def test_means_of_long_curves_cover_all_of_it():
    assert plots._means([1, 2, 3, 4, 5], 2) == [1.5, 3.5, 5]


def test_the_straight_line_is_the_schedules(tmp_path):
    from taid_megatron.schedules import TAIDSchedule

    run = load(make_run(tmp_path / "run"))
    schedule = TAIDSchedule(0.2, 1.0, 0.0, 0.0, total_steps=8, adaptive=False)
    expected = [schedule.t, *(schedule.update(1.0) for _ in range(3))]
    assert run.linear_t == ([1, 2, 3, 4], pytest.approx(expected))


def test_a_line_that_a_killed_process_left_is_passed_over(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert load(folder).last("loss") == 0.5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "is no run folder: it has no config.yaml"),
        (lambda run: (run / "metrics.jsonl").unlink(), "it has no metrics.jsonl"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"loss": 1}\n{"step": 2}\n'),
            "metrics.jsonl, line 1: not a record",
        ),
        (lambda run: (run / "run_status.json").write_text("{"), "run_status.json: not JSON"),
    ],
)
def test_what_is_no_run_is_one_line_and_exit_code_2(tmp_path, capsys, spoil, message):
    folder = make_run(tmp_path / "run")
    spoil(folder)
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_one_run_given_twice_is_refused(tmp_path):
    folder = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="given twice"):
        report([folder, folder], tmp_path / "page.html")


def test_text_is_text():
    table = Table(["<b>", "a|b"], [["&", "1"]])
    assert '<th class="words">&lt;b&gt;</th>' in table.html()
    assert ">&amp;</td>" in table.html()
    assert table.markdown().splitlines()[0] == "| <b> | a\\|b |"


def test_bars_of_masses_far_apart():
    png = bars(
        "Tail", "probability", ["teacher", "taid"], [1e-6, 1e-3], [0, 1e-4], logarithmic=True
    )
    assert png.startswith(b"\x89PNG")
