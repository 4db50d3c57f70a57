"""What the configured loss computes on the last stage."""

from types import SimpleNamespace

import pytest
import torch

from taid_megatron.config.schema import Loss
from taid_megatron.losses import distillation_loss
from taid_megatron.models.build import Head
from taid_megatron.models.pair import Outputs
from taid_megatron.training.objectives import TrainingObjective, build_temperature

WORLD = SimpleNamespace(groups=SimpleNamespace(tp=None), tensor_rank=0)
VOCABULARY = SimpleNamespace(padding=lambda rank: 2, shard_size=40)

SECTIONS = {
    "taid": ({}, {"t": 0.0}),
    "gjs": ({"beta": 0.3}, {"beta": 0.3}),
    "skew_kl": ({"lam": 0.4}, {"lam": 0.4}),
    "adaptive_kl": ({"mu": 0.8, "variant": "official"}, {"mu": 0.8, "variant": "official"}),
    "dkd": (
        {"alpha": 0.5, "beta": 3.0, "temperature": 1.5},
        {"alpha": 0.5, "beta": 3.0, "temperature": 1.5},
    ),
    "ctkd": ({"variant": "official"}, {"variant": "official", "temperature": 2.5}),
    "tvd": ({}, {}),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("name", SECTIONS)
def test_options_reach_the_loss(name, ce_weight, fused):
    """t = 0 included, which is a value and not a missing one; from logits as from heads."""
    section, options = SECTIONS[name]
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        Head(
            torch.randn(4, 3, width, generator=generator),
            torch.randn(40, width, generator=generator),
        )
        for width in (8, 12)
    )
    logits = [head.hidden @ head.weight.t() for head in (student, teacher)]
    labels = torch.randint(0, 38, (4, 3), generator=generator)
    mask = torch.rand(4, 3, generator=generator).round()
    objective = TrainingObjective(
        *(WORLD, VOCABULARY),
        loss=Loss(name=name, ce_weight=ce_weight, head_chunk_tokens=5, **section),
        sequence_parallel=False,
        t=0.0 if name == "taid" else None,
        temperature=2.5 if name == "ctkd" else None,
        logged=True,
        with_teacher=True,
        rule="paper",
    )
    expected = distillation_loss(
        *(name, *logits), labels=labels, ce_weight=ce_weight, padding=2, **options
    )
    outputs = Outputs(student, teacher) if fused else Outputs(logits[0].clone(), logits[1])
    total, figures = objective(outputs, labels, mask)
    assert list(figures) == list(objective.names)
    torch.testing.assert_close(figures["loss"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total, (expected * mask).sum(), atol=1e-4, rtol=1e-5)


def test_only_ctkd_has_a_temperature():
    assert build_temperature(Loss(name="tvd"), steps=10) is None
    section = Loss(name="ctkd", temperature_start=2.0, temperature_range=1.0)
    temperature = build_temperature(section, steps=10)
    assert 2.5 < temperature.value < 3.0
