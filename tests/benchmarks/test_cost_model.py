"""The cost model: what must hold whatever the constants are, its bytes against real buffers, and its page."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from cachedit_kernels import ulysses_pack
from cachedit_kernels.ulysses.layout import HEADS, SEQUENCE, even_splits

ROOT = Path(__file__).parents[2]


def test_one_rank_exchanges_nothing() -> None:
    from cost_model import FABRICS, WORKLOADS, compute_seconds, costs

    for workload, links in itertools.product(WORKLOADS, FABRICS):
        found = costs(workload, 1, links)
        assert {"ring", "Ulysses, bf16", "Ulysses, FP8", "tensor parallel"} == set(found)
        alone = compute_seconds(workload.linear_flops + workload.attention_flops)
        for cost in found.values():
            assert cost.exchange == 0 and cost.compute == pytest.approx(alone)


def test_no_scheme_computes_less_than_its_share() -> None:
    from cost_model import FABRICS, RANKS, WORKLOADS, compute_seconds, costs

    for workload, ranks in itertools.product(WORKLOADS, RANKS):
        least = compute_seconds(workload.linear_flops + workload.attention_flops) / ranks
        for cost in costs(workload, ranks, FABRICS[0]).values():
            assert cost.compute >= least * (1 - 1e-9)
            assert (cost.exchange > 0) == (ranks > 1)


@pytest.mark.parametrize("ranks", [2, 8, 16])
def test_faster_links_and_fewer_bytes_are_never_slower(ranks: int) -> None:
    from cost_model import FABRICS, WORKLOADS, costs, ulysses_exchange

    for workload, links in itertools.product(WORKLOADS, FABRICS):
        slow = costs(workload, ranks, links)
        for change in (
            {"inside": 2 * links.inside, "between": 2 * links.between},
            {"inside": 2 * links.inside},
            {"between": 2 * links.between},
            {"latency_inside": 0.0, "latency_between": 0.0},
        ):
            fast = costs(workload, ranks, links._replace(**change))
            best_hybrid = [min(c.total for n, c in found.items() if " x " in n) for found in (fast, slow) if ranks > 2]
            assert best_hybrid == sorted(best_hybrid)
            for name in set(slow) & set(fast):
                if " x " not in name:
                    assert fast[name].total <= slow[name].total
        wires = [ulysses_exchange(workload, ranks, links, wire) for wire in ("all FP8", "default", "bf16")]
        assert wires[0] < wires[1] < wires[2]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bytes_are_those_of_real_buffers(ranks: int) -> None:
    from count_exchange import WIRES, exchanged, wire_bytes
    from workloads import WORKLOADS

    small = WORKLOADS[3]._replace(tokens=13, heads=7, head_dim=24)
    lengths, heads = even_splits(13, ranks), even_splits(7, ranks)
    for float8 in WIRES.values():
        qkv, o = exchanged(small, ranks, float8)
        for rank in range(ranks):
            x = torch.zeros(1, lengths[rank], 7, 24, dtype=torch.bfloat16)
            assert ulysses_pack([x] * 3, heads, HEADS, float8[:3]).numel() == sum(qkv[rank])
            y = torch.zeros(1, 13, heads[rank], 24, dtype=torch.bfloat16)
            assert ulysses_pack([y], lengths, SEQUENCE, float8[3:]).numel() == sum(o[rank])
        busiest = sum(max(sum(row) - row[rank] for rank, row in enumerate(sent)) for sent in (qkv, o))
        received = sum(max(sum(column) - column[rank] for rank, column in enumerate(zip(*sent))) for sent in (qkv, o))
        assert max(busiest, received) <= wire_bytes(small, ranks, float8) <= busiest + received


def test_seconds_of_an_exchange() -> None:
    """By hand: two nodes of two, where rank 0 sends 10 bytes to its neighbour and 30 to the other node."""
    from cost_model import Fabric

    matrix = [[99, 10, 20, 10], [0, 99, 0, 0], [0, 0, 99, 0], [0, 0, 0, 99]]
    apart = Fabric("", inside=10.0, between=5.0, shared=False, node=2, latency_inside=0.0, latency_between=1.0)
    assert apart.seconds(matrix) == 30 / 5 + 1
    assert apart._replace(between=30.0).seconds(matrix) == 10 / 10 + 1
    assert apart._replace(between=30.0, shared=True).seconds(matrix) == 40 / 10 + 1


def test_the_page_is_up_to_date_and_says_what_the_model_does() -> None:
    import cost_model as model

    page = (ROOT / "docs" / "parallel-cost.md").read_text()
    flux, qwen, wan, z_image = model.WORKLOADS
    nvlink, pcie5, pcie4 = model.FABRICS
    tables = (
        model.best_table(model.FABRICS, model.WORKLOADS),
        model.full_table([nvlink], [flux, wan]),
        model.workloads_table(),
        model.constants_table(),
    )
    for table in tables:
        assert "\n".join(table) in page

    def milliseconds(workload: model.Workload, ranks: int, links: model.Fabric, scheme: str) -> float:
        return 1e3 * model.costs(workload, ranks, links)[scheme].total

    for workload, links, ranks in itertools.product(model.WORKLOADS, model.FABRICS, model.RANKS[1:]):
        assert model.best(workload, ranks, links)[0] != "tensor parallel"
    for image in (flux, qwen, z_image):
        for other in ("Ulysses, FP8", "tensor parallel"):
            assert milliseconds(image, 2, nvlink, other) < 1.15 * milliseconds(image, 2, nvlink, "ring")
        for links in (nvlink, pcie5, pcie4):
            for ranks in (4, 8):
                best = model.best(image, ranks, links)[1].total
                assert milliseconds(image, ranks, links, "Ulysses, FP8") < 1.02 * 1e3 * best
            two, four = (model.best(image, ranks, links)[1].total for ranks in (16, 32))
            assert four > two
        assert milliseconds(image, 8, nvlink, "ring") > 1.33 * milliseconds(image, 8, nvlink, "Ulysses, FP8")
    for links in (nvlink, pcie5, pcie4):
        assert model.best(wan, 16, links)[0] == "Ulysses 8 x ring 2"
        assert model.best(wan, 64, links)[0] == "Ulysses 8 x ring 8"
    assert milliseconds(wan, 2, nvlink, "Ulysses, FP8") < 1.03 * milliseconds(wan, 2, nvlink, "ring")
    for ranks in (4, 8):
        assert milliseconds(wan, ranks, nvlink, "Ulysses, FP8") == pytest.approx(
            milliseconds(wan, ranks, nvlink, "ring"), rel=0.02
        )
    assert round(milliseconds(flux, 8, pcie4, "Ulysses, FP8")) == 40
    assert round(milliseconds(flux, 8, pcie4, "Ulysses, bf16")) == 51
