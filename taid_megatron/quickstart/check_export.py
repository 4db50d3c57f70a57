"""Hold an exported folder against its checkpoint: transformers' logits, tokens, a continuation.

    python -m taid_megatron.quickstart.check_export CHECKPOINT FOLDER TOKENIZER.model TEXTS OUT.json

TEXTS: JSON lines {"text": ...}. A process of its own, so that transformers is loaded nowhere else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from data_tools.manifest import write_atomically

NUM_TEXTS = 20
CHARACTERS = 2000
PROMPT = "def read_file(path):\n"
NEW_TOKENS = 40


def check(checkpoint: Path, folder: Path, model: Path, texts: Path) -> dict[str, Any]:
    """Largest difference of logits, whether all token ids are the same, and a continuation."""
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    reference = SentencePieceProcessor(model_file=str(model))
    lines = texts.read_text(encoding="utf-8").splitlines()[:NUM_TEXTS]
    samples = [json.loads(line)["text"][:CHARACTERS] for line in lines]
    different = [
        number
        for number, text in enumerate(samples)
        if tokenizer(text, add_special_tokens=False).input_ids != reference.encode(text)
    ]
    prompt = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    written = exported.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return {
        "max_logit_difference": _logit_difference(checkpoint, exported, reference, samples),
        "texts": len(samples),
        "texts_with_other_ids": different,
        "continuation": tokenizer.decode(written[0], skip_special_tokens=True),
    }


def _logit_difference(checkpoint: Path, exported: Any, reference: Any, samples: list[str]) -> float:
    """Between transformers and the pipeline stage that trained it, fp32, over one batch."""
    import torch

    from taid_megatron.evaluation.run import whole_student

    with whole_student(checkpoint) as (logits, seq_length), torch.no_grad():
        rows = [reference.encode(text) for text in samples]
        rows = [row[:seq_length] for row in rows if len(row) >= seq_length][:8]
        if not rows:
            raise SystemExit(f"no held-out text has {seq_length} tokens")
        tokens = torch.tensor(rows)
        theirs = exported(tokens).logits
        ours = logits(tokens)[..., : theirs.shape[-1]]
        return float((ours - theirs).abs().max())


if __name__ == "__main__":
    *inputs, out = map(Path, sys.argv[1:])
    write_atomically(out, json.dumps(check(*inputs), indent=1).encode() + b"\n")
