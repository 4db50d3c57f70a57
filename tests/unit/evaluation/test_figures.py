"""Figures of an evaluation against their definitions, in float64 and in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from taid_megatron.evaluation.figures import NOT_ASKED, HeldOut, LastWord, compare
from taid_megatron.models.pair import Outputs
from taid_megatron.models.vocabulary import Vocabulary
from tests.distributed.ranks import run_ranks

SHARED, PADDED = 50, 64
VOCABULARY = Vocabulary(shared=SHARED, padded=PADDED, shards=1)


def logits(seed: int) -> torch.Tensor:
    """[s, b, V] with padding columns that would win every comparison."""
    rows = torch.randn(6, 3, PADDED, generator=torch.Generator().manual_seed(seed)) * 3
    rows[..., SHARED:] = 50.0
    return rows


def by_hand(student: list[float], teacher: list[float], label: int) -> dict[str, float]:
    def softmax(values: list[float]) -> list[float]:
        powers = [math.exp(value) for value in values]
        return [power / sum(powers) for power in powers]

    q, p = softmax(student), softmax(teacher)
    ranked = sorted(range(len(teacher)), key=lambda token: -teacher[token])
    head, tail = ranked[:10], ranked[-len(ranked) // 5 :]
    return {
        "loss": -math.log(q[label]),
        "teacher_cross_entropy": -math.log(p[label]),
        "kl": sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
        "top1_agreement": float(student.index(max(student)) == ranked[0]),
        "head_mass": sum(q[token] for token in head),
        "teacher_head_mass": sum(p[token] for token in head),
        "tail_mass": sum(q[token] for token in tail),
        "teacher_tail_mass": sum(p[token] for token in tail),
    }


@pytest.mark.parametrize("chunk_bytes", [2**27, 4 * SHARED * 4])
def test_held_out_figures_are_their_definitions(monkeypatch, chunk_bytes):
    from taid_megatron.evaluation import figures

    monkeypatch.setattr(figures, "_CHUNK_BYTES", chunk_bytes)
    student, teacher = logits(0), logits(1)
    teacher[0] = student[0] + 0.01  # agreement somewhere
    labels = torch.randint(0, SHARED, (6, 3), generator=torch.Generator().manual_seed(2))
    measure = HeldOut(VOCABULARY, None, with_teacher=True)
    mask = torch.ones(6, 3)
    mask[2:] = 0
    total, found = measure(Outputs(student, teacher), labels, mask)
    assert total == pytest.approx(found["loss"][:2].sum())
    assert set(found) == set(measure.names)
    for s in range(6):
        for b in range(3):
            expected = by_hand(
                student[s, b, :SHARED].tolist(),
                teacher[s, b, :SHARED].tolist(),
                int(labels[s, b]),
            )
            for name, value in expected.items():
                assert found[name][s, b].item() == pytest.approx(value, rel=2e-5, abs=1e-6), name
    assert 0 < found["top1_agreement"].mean() < 1


def test_equal_models_agree_in_everything():
    rows = logits(3)[..., :SHARED].flatten(0, 1)
    found = compare(rows, rows.clone(), torch.zeros(len(rows), dtype=torch.int64))
    assert found["kl"].abs().max() < 1e-6
    assert (found["top1_agreement"] == 1).all()
    assert torch.equal(found["head_mass"], found["teacher_head_mass"])
    assert (found["head_mass"] > found["tail_mass"]).all()


def test_alone_a_model_has_its_cross_entropy():
    measure = HeldOut(VOCABULARY, None, with_teacher=False)
    labels = torch.zeros(6, 3, dtype=torch.int64)
    _, found = measure(Outputs(logits(0), None), labels, torch.ones(6, 3))
    expected = -logits(0)[..., :SHARED].double().log_softmax(-1)[..., 0]
    assert list(found) == ["loss"]
    assert (found["loss"] - expected).abs().max() < 1e-5


def test_a_word_is_guessed_where_all_its_tokens_are():
    student = logits(4)
    best = student[..., :SHARED].argmax(-1)  # [s, b]
    labels = torch.full((6, 3), NOT_ASKED)
    labels[2:4, 0] = best[2:4, 0]  # both right
    labels[2:4, 1] = best[2:4, 1]
    labels[3, 1] = (best[3, 1] + 1) % SHARED  # one of two right
    labels[5, 2] = best[5, 2]
    measure = LastWord(VOCABULARY, None, with_teacher=True)
    _, found = measure(Outputs(student, logits(5)), labels, torch.ones(6, 3))
    assert found["accuracy"][0].tolist() == [1.0, 0.0, 1.0]
    assert torch.equal(found["accuracy"], found["accuracy"][:1].expand(6, 3))
    log_q = student[..., :SHARED].log_softmax(-1)
    expected = -(log_q[2, 0, labels[2, 0]] + log_q[3, 0, labels[3, 0]])
    assert found["loss"][0, 0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert found["teacher_accuracy"][0].sum() < 3


def _share_of_the_words(rank: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, SHARED, (6, 3), generator=generator)
    labels[:2] = labels[4, 1] = NOT_ASKED
    student = logits(4)
    student[2:4, 0, :SHARED] = 20 * torch.eye(SHARED)[labels[2:4, 0]]
    whole = LastWord(VOCABULARY, None, with_teacher=False)
    _, expected = whole(Outputs(student, None), labels, torch.ones(6, 3))
    mine = [0, 5, 2] if rank == 0 else [1, 4, 3]
    shared = LastWord(VOCABULARY, None, with_teacher=False, cp_group=dist.group.WORLD)
    _, found = shared(Outputs(student[mine], None), labels[mine], torch.ones(3, 3))
    return torch.stack([found[name] - expected[name][:3] for name in ("loss", "accuracy")])


def test_context_parallel_ranks_know_the_whole_word() -> None:
    for difference in run_ranks(2, _share_of_the_words):
        assert difference.abs().max() < 1e-5
