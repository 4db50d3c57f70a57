"""Examples for the `--help` of each command."""

from __future__ import annotations

_EXAMPLES = {
    "train": (
        "taid-megatron train student.yaml",
        "taid-megatron train student.yaml optimizer.lr=1e-4 training.stop_at=100",
        "torchrun --nproc-per-node 8 -m taid_megatron train student.yaml parallel.tensor=2",
        "bash launch/torchrun.sh train student.yaml",
    ),
    "index": ("taid-megatron index student.yaml --ranks 80",),
    "quickstart": (
        "taid-megatron quickstart",
        "taid-megatron quickstart --folder /tmp/quickstart --seeds 3 --fresh",
    ),
    "report": (
        "taid-megatron report runs/student-taid",
        "taid-megatron report runs/taid runs/forward-kl --out comparison.html",
    ),
    "import": ("taid-megatron import --hf models/large --out checkpoints/large --dtype bf16",),
    "export": (
        "taid-megatron export runs/student-taid --out models/student",
        "taid-megatron export runs/taid/checkpoints/step_00001000 --out models/1000 --dtype bf16",
    ),
    "evaluate": (
        "taid-megatron evaluate runs/student-taid --out runs/student-taid/evaluation",
        "taid-megatron evaluate runs/student-taid --last-word lambada.jsonl",
        "taid-megatron evaluate models/student teacher.hf=models/large data.validation=data/new",
        "taid-megatron evaluate models/student --suite smollm",
    ),
    "plan": (
        "taid-megatron plan launch/recipes/taid_phi3_tinyllama.yaml --gpus 80 --gpu h100",
        "taid-megatron plan student.yaml --gpus 16 --gpu a100 --balance --page plan.html",
        "taid-megatron plan student.yaml --gpus 16 parallel.pipeline=4 --json",
    ),
    "doctor": (
        "taid-megatron doctor",
        "taid-megatron doctor student.yaml",
        "taid-megatron doctor --checkpoint runs/student-taid",
        "torchrun --nproc-per-node 8 -m taid_megatron doctor --network",
    ),
}
OVERVIEW = """\b
Where to start:
  taid-megatron quickstart              all of it in small, on this machine
  taid-megatron doctor CONFIG           is the machine ready for this run
  taid-megatron plan CONFIG --gpus 80   what the run needs, and how long it takes
  taid-megatron train CONFIG            run it; the same command resumes
  taid-megatron report RUN...           compare what runs logged

\b
Exit codes: 0 done; 2 something to mend in arguments, configuration or input;
1 an internal failure; 75 stopped on a signal with a checkpoint, to be resumed.
Keys of a configuration: docs/configuration.md."""


def examples(command: str) -> str:
    """The end of a command's help; lines stay as they are (click's \\b)."""
    lines = "\n".join(f"  {line}" for line in _EXAMPLES[command])
    return f"\b\nExamples:\n{lines}"
