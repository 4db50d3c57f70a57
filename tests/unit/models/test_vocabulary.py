"""Every token id of either model lies in exactly one shard, and padding is what is left."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from taid_megatron.models.vocabulary import DIVISOR, align

SIZES = st.integers(1, 5000)


@given(student=SIZES, teacher=st.none() | SIZES, shards=st.sampled_from([1, 2, 4, 8]))
def test_shards_cover_the_shared_ids_once(student, teacher, shards) -> None:
    vocabulary = align(student, teacher, shards)
    real = [vocabulary.shard_size - vocabulary.padding(shard) for shard in range(shards)]

    assert sum(real) == vocabulary.shared == min(student, teacher or student)
    assert vocabulary.padded >= max(student, teacher or 0)
    assert vocabulary.padded < max(student, teacher or 0) + DIVISOR * shards
    assert vocabulary.shard_size % DIVISOR == 0
    # real columns come first: a shard may only be short where the next one is empty
    assert all(a == vocabulary.shard_size or b == 0 for a, b in zip(real, real[1:], strict=False))


def test_two_paddings_of_one_tokenizer_share_their_shard_boundaries() -> None:
    # Qwen2's small and large models
    vocabulary = align(151_936, 152_064, shards=8)
    assert vocabulary.shared == 151_936
    assert vocabulary.padded == 152_576
    assert [vocabulary.padding(shard) for shard in (0, 6, 7)] == [0, 0, 640]
