"""A cost model of one forward under sequence and tensor parallelism, and the scheme that it favours.

Time is compute at a fixed utilisation, plus what the scheme exchanges over the links' usable bandwidth, plus a latency
per collective, plus reading and writing what is packed. Bytes are those of `cachedit_kernels/ulysses/layout.py`, FLOPs
those of `workloads.py`; every other number is in CONSTANTS, with where it is from. It is a model: nothing in its output
has been measured on GPUs.

    python benchmarks/cost_model.py               # the tables of docs/parallel-cost.md
    python benchmarks/cost_model.py --models FLUX.1 --fabrics NVLink --all
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cachedit_kernels.ulysses.layout import even_splits
from count_exchange import ELEMENT_BYTES, WIRES, busiest, exchanged
from workloads import WORKLOADS, Workload


class Constant(NamedTuple):
    value: float
    unit: str
    source: str


CONSTANTS = {
    "peak": Constant(989e12, "FLOP/s", "H100 and H200 SXM, dense bfloat16, NVIDIA's data sheets"),
    "utilisation": Constant(0.5, "of peak", "assumed"),
    "memory": Constant(0.8 * 3.35e12, "B/s", "H100's HBM3 by its data sheet, of which 80 % are assumed to be usable"),
    "NVLink": Constant(
        370e9,
        "B/s per direction",
        "NVLink 4: 900 GB/s are 450 per direction; what NCCL reaches of it: github.com/NVIDIA/nccl-tests/issues/212",
    ),
    "PCIe 5": Constant(50e9, "B/s per direction", "16 lanes of 32 GT/s carry 63 GB/s, of which 80 % are assumed"),
    "PCIe 4": Constant(25e9, "B/s per direction", "16 lanes of 16 GT/s carry 31.5 GB/s, of which 80 % are assumed"),
    "InfiniBand": Constant(
        48e9,
        "B/s per direction and GPU",
        "400 Gb/s, one port per GPU (assumed, as in DGX H100); 48 to 49 GB/s: github.com/NVIDIA/nccl-tests/issues/267",
    ),
    "node": Constant(8, "GPUs", "as in DGX and HGX H100"),
    "latency in a node": Constant(20e-6, "s per collective", "assumed"),
    "latency between nodes": Constant(40e-6, "s per collective", "assumed"),
}
RANKS = (1, 2, 4, 8, 16, 32, 64)


class Fabric(NamedTuple):
    """Links of nodes; bandwidths in bytes per second and direction, of each GPU."""

    name: str
    inside: float  # within a node
    between: float  # to other nodes
    shared: bool  # whether what goes to other nodes takes the same link out of the GPU
    node: int = int(CONSTANTS["node"].value)
    latency_inside: float = CONSTANTS["latency in a node"].value
    latency_between: float = CONSTANTS["latency between nodes"].value

    def latency(self, ranks: int) -> float:
        return self.latency_inside if ranks <= self.node else self.latency_between

    def seconds(self, matrix: Sequence[Sequence[int]]) -> float:
        """Of an all-to-all: all links work at once, and the slowest one counts."""
        between = busiest(matrix, lambda rank, peer: rank // self.node != peer // self.node)
        inside = busiest(
            matrix, lambda rank, peer: rank != peer and (self.shared or rank // self.node == peer // self.node)
        )
        return max(inside / self.inside, between / self.between) + self.latency(len(matrix))


def fabric(name: str) -> Fabric:
    inside = CONSTANTS[name].value
    return Fabric(name, inside, min(inside, CONSTANTS["InfiniBand"].value), shared=name != "NVLink")


FABRICS = (fabric("NVLink"), fabric("PCIe 5"), fabric("PCIe 4"))


class Cost(NamedTuple):
    """Seconds of a forward; `exchange` is what is not hidden behind computing."""

    compute: float
    exchange: float

    @property
    def total(self) -> float:
        return self.compute + self.exchange


def compute_seconds(flops: float) -> float:
    return flops / (CONSTANTS["peak"].value * CONSTANTS["utilisation"].value)


def share(total: int, ranks: int) -> float:
    """Of the rank that has most."""
    return even_splits(total, ranks)[0] / total


def memory_seconds(nbytes: float) -> float:
    return nbytes / CONSTANTS["memory"].value


def ulysses(workload: Workload, ranks: int, links: Fabric, wire: str) -> Cost:
    """Tokens are shared out, and in attention heads; two exchanges a layer, not hidden."""
    attention = workload.attention_flops * share(workload.heads, ranks)
    compute = compute_seconds(workload.linear_flops * share(workload.tokens, ranks) + attention)
    return Cost(compute, workload.layers * ulysses_exchange(workload, ranks, links, wire))


def ulysses_exchange(workload: Workload, ranks: int, links: Fabric, wire: str) -> float:
    """Of a layer: the transfers, and packing and unpacking."""
    if ranks == 1:
        return 0.0
    seconds = 0.0
    for matrix, tensors in zip(exchanged(workload, ranks, WIRES[wire]), (3, 1), strict=True):
        plain = tensors * ELEMENT_BYTES * workload.tokens * workload.hidden / ranks
        packed = sum(matrix[0])
        seconds += links.seconds(matrix) + memory_seconds(2 * (plain + packed))
    return seconds


def ring(workload: Workload, ranks: int, links: Fabric, ulysses_size: int = 1, wire: str = "default") -> Cost:
    """Keys and values go round `ranks // ulysses_size` ranks in bfloat16 while attention is computed on what is there.

    With Ulysses inside: groups of neighbouring ranks exchange heads first, and each rank passes on its heads only.
    """
    rounds = ranks // ulysses_size
    tokens = even_splits(workload.tokens, rounds)[0]
    heads = even_splits(workload.heads, ulysses_size)[0]
    linear = compute_seconds(workload.linear_flops * share(workload.tokens, ranks))
    block = compute_seconds(
        workload.attention_flops / workload.layers / rounds * (tokens / workload.tokens) * (heads / workload.heads)
    )
    part = tokens * heads * workload.head_dim  # elements of K, and of the result
    bandwidth = links.inside if ranks <= links.node else links.between
    hop = 2 * part * ELEMENT_BYTES / bandwidth + links.latency(ranks)
    merge = memory_seconds(part * (4 + 2 + 4))  # a float32 result takes in a bfloat16 one
    waiting = max(0.0, hop - block)
    exchange = workload.layers * (rounds - 1) * (waiting + merge)
    if ulysses_size > 1:
        inner = workload._replace(tokens=tokens)
        exchange += workload.layers * ulysses_exchange(inner, ulysses_size, links, wire)
    return Cost(linear + workload.layers * rounds * block, exchange)


def ulysses_ring(workload: Workload, ranks: int, links: Fabric) -> tuple[Cost, int]:
    """The best split, Ulysses within a node: its cost and the size of Ulysses."""
    sizes = [u for u in range(2, min(ranks // 2, links.node, workload.heads) + 1) if ranks % u == 0]
    return min(((ring(workload, ranks, links, u), u) for u in sizes), key=lambda found: found[0].total)


def tensor_parallel(workload: Workload, ranks: int, links: Fabric) -> Cost:
    """Weights and heads are shared out; all tokens are reduced in bfloat16 behind every row-parallel layer."""
    compute = compute_seconds((workload.linear_flops + workload.attention_flops) * share(workload.heads, ranks))
    if ranks == 1:
        return Cost(compute, 0.0)
    # A ring of all ranks crosses between nodes over as many ports as a node has.
    bandwidth = links.inside if ranks <= links.node else min(links.inside, links.node * links.between)
    nbytes = 2 * (ranks - 1) / ranks * workload.tokens * workload.hidden * ELEMENT_BYTES
    return Cost(compute, workload.row_parallel * (nbytes / bandwidth + links.latency(ranks)))


def costs(workload: Workload, ranks: int, links: Fabric) -> dict[str, Cost]:
    """By scheme; those that leave ranks without heads, or need two factors, are left out where they do."""
    found = {"ring": ring(workload, ranks, links)}
    if ranks <= workload.heads:
        found["Ulysses, bf16"] = ulysses(workload, ranks, links, "bf16")
        found["Ulysses, FP8"] = ulysses(workload, ranks, links, "default")
        found["tensor parallel"] = tensor_parallel(workload, ranks, links)
    if ranks >= 4:
        cost, size = ulysses_ring(workload, ranks, links)
        found[f"Ulysses {size} x ring {ranks // size}"] = cost
    return found


def best(workload: Workload, ranks: int, links: Fabric) -> tuple[str, Cost]:
    return min(costs(workload, ranks, links).items(), key=lambda item: item[1].total)


def constants_table() -> Iterator[str]:
    yield from ("| constant | value | source |", "|---|---|---|")
    for name, constant in CONSTANTS.items():
        yield f"| {name} | {constant.value:g} {constant.unit} | {constant.source} |"


def workloads_table() -> Iterator[str]:
    yield "| model | parameters, 10**9 | layers | heads | tokens | linear, TFLOP | attention, TFLOP | one GPU, ms |"
    yield "|---|---|---|---|---|---|---|---|"
    for w in WORKLOADS:
        row = (w.name, f"{w.parameters / 1e9:.2f}", w.layers, w.heads, w.tokens)
        flops = (f"{w.linear_flops / 1e12:.1f}", f"{w.attention_flops / 1e12:.1f}")
        alone = f"{1e3 * compute_seconds(w.linear_flops + w.attention_flops):.0f}"
        yield "| " + " | ".join(map(str, (*row, *flops, alone))) + " |"


def best_table(fabrics: Sequence[Fabric], workloads: Sequence[Workload]) -> Iterator[str]:
    yield "| model | links | " + " | ".join(f"P = {ranks}" for ranks in RANKS[1:]) + " |"
    yield "|---|---|" + "---|" * len(RANKS[1:])
    for workload in workloads:
        for links in fabrics:
            cells = []
            for ranks in RANKS[1:]:
                scheme, cost = best(workload, ranks, links)
                alone = tensor_parallel(workload, 1, links).total
                cells.append(f"{scheme}: {1e3 * cost.total:.1f} ms ({alone / cost.total:.1f}x)")
            yield f"| {workload.name} | {links.name} | " + " | ".join(cells) + " |"


def full_table(fabrics: Sequence[Fabric], workloads: Sequence[Workload]) -> Iterator[str]:
    yield "| model | links | P | ring | Ulysses, bf16 | Ulysses, FP8 | Ulysses x ring | tensor parallel |"
    yield "|---|---|---|---|---|---|---|---|"
    for workload in workloads:
        for links in fabrics:
            for ranks in RANKS[1:]:
                found = {name.partition(" x ")[1] or name: cost for name, cost in costs(workload, ranks, links).items()}
                cells = []
                for name in ("ring", "Ulysses, bf16", "Ulysses, FP8", " x ", "tensor parallel"):
                    cost = found.get(name)
                    cells.append("" if cost is None else f"{1e3 * cost.total:.1f} ({1e3 * cost.exchange:.1f})")
                yield f"| {workload.name} | {links.name} | {ranks} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models, names = [w.name for w in WORKLOADS], [f.name for f in FABRICS]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--fabrics", nargs="+", choices=names, default=names)
    parser.add_argument("--all", action="store_true", help="every scheme's milliseconds (and those of its exchanges)")
    arguments = parser.parse_args()
    workloads = [w for w in WORKLOADS if w.name in arguments.models]
    fabrics = [f for f in FABRICS if f.name in arguments.fabrics]
    if arguments.all:
        print("\n".join(full_table(fabrics, workloads)))
        return
    for table in (constants_table(), workloads_table(), best_table(fabrics, workloads)):
        print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()
