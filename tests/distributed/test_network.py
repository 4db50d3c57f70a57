"""The doctor's measurement on gloo ranks."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from taid_megatron.planning import network

from .ranks import run_ranks


def measured(rank: int, world_size: int, slow_rank: int | None) -> network.Network:
    network._BYTES = 1 << 16
    if rank == slow_rank:
        send = dist.send

        def late(*arguments, **options):
            time.sleep(0.3)
            return send(*arguments, **options)

        dist.send = late
    return network.measure(torch.device("cpu"))


def test_all_ranks_know_the_same_figures_and_every_link_has_one() -> None:
    found = run_ranks(2, measured, None)
    assert found[0] == found[1]
    assert found[0].all_reduce > 0
    assert len(found[0].links) == 1
    assert found[0].links[0] > 0


def test_a_rank_that_answers_late_is_named() -> None:
    found = run_ranks(5, measured, 3)
    assert all(one == found[0] for one in found)
    assert {link[:2] for link in found[0].slow_links()} >= {(2, 3), (3, 4)}
    assert found[0].suspect() == 3
