"""Exchanges by writing into each other's memory, played over shared files: slots, order, and when it is chosen.

That results are those of the all-to-all, for uneven everything, is in test_exchange.py, which runs with both.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cachedit_kernels import quantized_all_to_all
from cachedit_kernels.ulysses import Transport, begin_scatter_heads, symmetric, transport
from cachedit_kernels.ulysses.transport import VARIABLE, Facts, obstacle_between
from ranks import run_ranks

PLAIN = (False,) * 3


def forced(folder: Path, function: str, *args: Any) -> Any:
    """On a rank: a function of this module, by writing, with shared files in a folder."""
    os.environ[VARIABLE] = "symmetric"
    tempfile.tempdir = str(folder)
    return globals()[function](*args)


def only_slots() -> symmetric.Slots:
    (slots,) = symmetric._slots.values()
    return slots


def numbered(i: int, tokens: int = 2) -> Tensor:
    """What rank r sends in exchange i: 100 * i + r everywhere."""
    return torch.full((1, tokens, 2, 8), 100.0 * i + dist.get_rank())


def gathered(i: int) -> Tensor:
    """What every rank gets of it: one head of all ranks' tokens."""
    return torch.cat([torch.full((1, 2, 1, 8), 100.0 * i + rank) for rank in range(dist.get_world_size())], dim=1)


def read_late(seconds: float) -> None:
    """This rank dawdles between the barrier and unpacking, while others go on to what they send next."""
    allocate = symmetric._allocate_in_files

    def allocate_slow(*args: object) -> symmetric.Slot:
        slot = allocate(*args)
        barrier = slot.barrier

        def late() -> None:
            barrier()
            time.sleep(seconds)

        slot.barrier = late
        return slot

    symmetric._allocate_in_files = allocate_slow


def one_after_the_other(rounds: int) -> int:
    if dist.get_rank() == 1:
        read_late(0.02)
    for i in range(rounds):
        for got in quantized_all_to_all(*[numbered(i)] * 3, float8=PLAIN):
            assert torch.equal(got, gathered(i)), f"exchange {i} was overwritten"
    return only_slots().allocated


def test_two_slots_serve_what_follows_one_another(tmp_path: Path) -> None:
    assert run_ranks(forced, 2, tmp_path, "one_after_the_other", 20) == [2, 2]
    assert not list(tmp_path.glob("cachedit-*"))  # mapped, and no longer there


def several_under_way(rounds: int) -> int:
    if dist.get_rank() == 0:
        read_late(0.01)
    for i in range(rounds):
        exchanges = [begin_scatter_heads([numbered(3 * i + j)], float8=[False]) for j in range(3)]
        for j in (1, 0, 2):
            assert torch.equal(exchanges[j].wait()[0], gathered(3 * i + j))
    return only_slots().allocated


def test_three_under_way_take_four_slots(tmp_path: Path) -> None:
    assert run_ranks(forced, 2, tmp_path, "several_under_way", 6) == [4, 4]


def grows() -> tuple[int, int]:
    """Slots that have become too small go; what is sent later, and is smaller, takes the larger ones."""
    for tokens in (2, 30_000, 60_000, 2, 60_000):
        for _ in range(3):
            got, *_ = quantized_all_to_all(*[numbered(1, tokens)] * 3, float8=PLAIN)
            assert got.shape == (1, 2 * tokens, 1, 8)
    slots = only_slots()
    return slots.allocated, len(slots.slots)


def test_outgrown_slots_are_freed(tmp_path: Path) -> None:
    assert run_ranks(forced, 2, tmp_path, "grows") == [(6, 2)] * 2


def modes() -> str:
    with torch.inference_mode():
        quantized_all_to_all(*[numbered(1)] * 3)
    got, *_ = quantized_all_to_all(*[numbered(2)] * 3, float8=PLAIN)
    assert torch.equal(got, gathered(2))
    exchange = begin_scatter_heads([numbered(3)], float8=[False])
    exchange.wait()
    with pytest.raises(RuntimeError) as error:
        exchange.wait()
    return str(error.value)


def test_inference_mode_and_waiting_twice(tmp_path: Path) -> None:
    expected = "symmetric_receive: ticket must be of an exchange under way, got one that has been received"
    assert run_ranks(forced, 2, tmp_path, "modes") == [expected] * 2


def transports(settings: list[str | None]) -> Transport | str:
    setting = settings[dist.get_rank()]
    os.environ.pop(VARIABLE, None)
    if setting is not None:
        os.environ[VARIABLE] = setting
    try:
        return tuple(transport())
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([None, None], Transport("collective", "tensors on CPU go over the group's backend")),
        (["collective"] * 2, Transport("collective", f"forced by {VARIABLE}")),
        (["symmetric"] * 2, Transport("symmetric", f"forced by {VARIABLE}")),
        (["nvlink"] * 2, f"{VARIABLE} must be one of collective, symmetric, got 'nvlink'"),
        (
            ["symmetric", "collective"],
            f"{VARIABLE} must be the same on all ranks, got ['symmetric', 'collective']",
        ),
    ],
)
def test_forcing(settings: list[str | None], expected: Transport | str) -> None:
    assert run_ranks(transports, 2, settings) == [expected] * 2


def wrong_place() -> Transport | str:
    if dist.get_rank() == 1:
        pack = symmetric._pack_into
        symmetric._pack_into = lambda *args: pack(*args[:-1], [offset + 16 for offset in args[-1]])
    return transports(["symmetric"] * 2)


def test_a_trial_that_fails_is_told_on_all_ranks() -> None:
    told = f"{VARIABLE}=symmetric, but a trial has failed on rank 0: something else than what was sent has arrived; "
    told += "rank 1: something else than what was sent has arrived"
    assert run_ranks(wrong_place, 2) == [told] * 2


def rank(device: int | None, host: str = "a", reachable: tuple[int, ...] = (0, 1), missing: str | None = None) -> Facts:
    return Facts(None, host, device, reachable, missing)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ([rank(0), rank(1)], None),
        ([rank(None, reachable=()), rank(None, reachable=())], None),
        ([rank(0), rank(1, missing="No module named 'triton'")], "rank 1 lacks it: No module named 'triton'"),
        ([rank(0), rank(1, host="b")], "its ranks are on several hosts: a, b"),
        ([rank(0), rank(0)], "ranks 0 and 1 both call their device 0, so that none knows the other's"),
        ([rank(0), rank(1, reachable=(1,))], "device 1 can't address the memory of device 0"),
    ],
)
def test_obstacles(facts: list[Facts], expected: str | None) -> None:
    assert obstacle_between(facts) == expected
