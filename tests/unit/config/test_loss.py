"""The loss section: every loss by name, its options and no others."""

import pytest
from pydantic import ValidationError

from taid_megatron.config.schema import LOSS_OPTIONS, Config, Loss
from taid_megatron.losses.kernels import KERNELS
from taid_megatron.losses.registry import COLLECTIVES, LOSSES, VARIANTS

# What moves during a run is not configured as a value of the loss.
MOVING = {"taid": {"t"}, "ctkd": {"temperature"}}
OF_THE_SCHEDULE = {"temperature_start", "temperature_range", "temperature_lr"}


def test_the_section_knows_what_the_registry_knows():
    assert set(LOSS_OPTIONS) == set(LOSSES)
    for name, loss in LOSSES.items():
        configured = set(LOSS_OPTIONS[name]) - OF_THE_SCHEDULE
        assert configured == set(loss.options) - MOVING.get(name, set()), name
        assert Loss(name=name).name == name
    fields = Loss.model_fields
    assert KERNELS == fields["kernel"].annotation.__args__
    assert COLLECTIVES == fields["collective"].annotation.__args__
    assert VARIANTS == fields["variant"].annotation.__args__[0].__args__
    assert "loss" in Config.model_fields


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "tvd", "beta": 0.3}, "beta is not an option of tvd but of gjs, dkd: remove it"),
        ({"name": "taid", "temperature": 2.0}, "temperature is not an option of taid but of dkd"),
        ({"name": "ctkd", "temperature": 2.0}, "temperature is not an option of ctkd but of dkd"),
        ({"name": "gjs", "beta": 1.0}, "beta 1.0 of gjs is not between 0 and 1"),
        ({"name": "skew_kl", "lam": 0.0}, "greater than 0"),
        ({"name": "adaptive_kl", "variant": "text"}, "'paper' or 'official'"),
        ({"name": "kl"}, "taid"),
    ],
)
def test_wrong_sections(section, message):
    with pytest.raises(ValidationError, match=message):
        Loss(**section)
