"""Examples for the `--help` of each command."""

from __future__ import annotations

_EXAMPLES = {
    "prepare": (
        "taid-data prepare texts/ --tokenizer tokenizer.json --out data/web",
        "taid-data prepare 'web/*.parquet' --tokenizer t.json --out data/web --on-error skip",
        "taid-data prepare web/ --tokenizer t.json --out data/web-2 --shard 2/4",
        "taid-data prepare smollm/ --preset smollm-corpus --tokenizer t.json --out data",
        "taid-data prepare hf://datasets/OWNER/NAME --tokenizer t.json --out d --fraction 0.1",
    ),
    "fetch-python-edu": (
        "taid-data fetch-python-edu 'smollm/python-edu/*.parquet' --out smollm/python-edu",
    ),
    "tokenizer": (
        "taid-data tokenizer texts/ --out tokenizer.json --vocab-size 32000",
        "taid-data tokenizer texts/ --out tokenizer.model --vocab-size 32000 --sample-mb 50",
    ),
    "corpus": ("taid-data corpus texts/python",),
    "inspect": (
        "taid-data inspect data/web",
        "taid-data inspect data/web --tokenizer tokenizer.json --first 1000 --documents 3",
        "taid-data inspect data/web --documents 0 --histogram lengths.png",
    ),
    "verify": (
        "taid-data verify data/web",
        "taid-data verify data/web --fast",
        "taid-data verify data/web --tokenizer tokenizer.json",
    ),
    "merge": ("taid-data merge data/web-1 data/web-2 data/web-3 data/web-4 --out data/web",),
    "split": ("taid-data split data/web train=0.99 validation=0.01 --out data/web",),
    "blend": (
        "taid-data blend data/web=0.8 data/code=0.2 --out blend.yaml",
        'taid-megatron train CONFIG "data.blend=$(cat blend.yaml)"',
    ),
}
OVERVIEW = """\b
Where to start:
  taid-data tokenizer TEXTS --out tokenizer.json --vocab-size 32000
  taid-data prepare TEXTS --tokenizer tokenizer.json --out data/web
  taid-data verify data/web
  taid-data inspect data/web --tokenizer tokenizer.json

\b
A command that was stopped goes on when it is given again. Exit codes: 0 done; 2
something to mend in arguments or input, in one line; 1 a failure of the machine;
130 interrupted. What is written, and what is checked: docs/data.md."""


def examples(command: str) -> str:
    """The end of a command's help; lines stay as they are (click's \\b)."""
    lines = "\n".join(f"  {line}" for line in _EXAMPLES[command])
    return f"\b\nExamples:\n{lines}"
