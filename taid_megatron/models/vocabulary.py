"""Student and teacher over one padded vocabulary, so that their shards hold the same token ids.

Two models of one tokenizer family differ in how their embedding was padded (151,936 and 152,064
rows, say). Padding each to its own multiple of the tensor-parallel size would put the shard
boundaries at different ids; both heads are therefore built with one common padded size, and the
columns beyond the shared real ids are left out of both distributions.
"""

from __future__ import annotations

from dataclasses import dataclass

DIVISOR = 128
"""Rows of a shard are a multiple of this: what tensor cores want (Megatron's default)."""


@dataclass(frozen=True)
class Vocabulary:
    """Sizes in token ids; a shard is one tensor-parallel rank's part of a head."""

    shared: int
    """Ids that both models know: the support of both distributions."""
    padded: int
    """Rows of both heads over all shards."""
    shards: int

    @property
    def shard_size(self) -> int:
        """Rows of one shard."""
        return self.padded // self.shards

    def padding(self, shard: int) -> int:
        """Trailing columns of this shard that carry no mass: 0 to shard_size."""
        return min(max((shard + 1) * self.shard_size - self.shared, 0), self.shard_size)


def align(student_size: int, teacher_size: int | None, shards: int) -> Vocabulary:
    """The common vocabulary of a pair whose real sizes are given; teacher_size None: no teacher."""
    sizes = [student_size] if teacher_size is None else [student_size, teacher_size]
    multiple = DIVISOR * shards
    padded = -(-max(sizes) // multiple) * multiple
    return Vocabulary(shared=min(sizes), padded=padded, shards=shards)
