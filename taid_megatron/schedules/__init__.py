"""Schedules of the distillation: values in, a value out; no torch, no process groups."""

from taid_megatron.schedules.ctkd import CTKDTemperature
from taid_megatron.schedules.taid import TAIDSchedule

__all__ = ["CTKDTemperature", "TAIDSchedule"]
