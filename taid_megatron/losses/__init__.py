"""Per-token distillation losses on vocabulary shards; process groups are arguments."""

from taid_megatron.losses import reference
from taid_megatron.losses.registry import distillation_loss

__all__ = ["distillation_loss", "reference"]
