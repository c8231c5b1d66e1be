"""The benchmarks of sequence parallelism: rows that can be read, candidates that compute the same, counts."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cachedit_kernels.ulysses.layout import even_splits

ROOT = Path(__file__).parents[2]


def test_benchmarks_add_rows_to_one_history(tmp_path: Path) -> None:
    history = tmp_path / "exchange.csv"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for script in ("bench_ulysses.py", "bench_attention.py"):
        command = [sys.executable, ROOT / "benchmarks" / script, "--device", "cpu", "--scale", "0.003", "--rounds", "1"]
        command += ["--models", "Z-Image", "--ranks", "4", "--no-compile", "--csv", history]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    with history.open() as file:
        rows = list(csv.DictReader(file))
    operators = ["ulysses_pack"] * 2 + ["ulysses_unpack"] * 2 + ["merge_attention"] * 2
    assert [row["operator"] for row in rows] == operators
    # 12 tokens of four ranks; of 30 heads rank 0 has eight
    assert [(row["tokens"], row["heads"]) for row in rows] == [
        *(("3", "30"), ("12", "8"), ("12", "8"), ("3", "30")),
        *(("3", "30"), ("3", "30")),
    ]
    for row in rows:
        assert all(row[column] for column in ("date", "device", "torch", "backend")) and row["model"] == "Z-Image"
        assert all(float(row[column]) > 0 for column in ("ours_ms", "eager_ms", "copy_ms", "ours_gbps"))


@pytest.mark.parametrize("ranks", [2, 4])
def test_candidates_unpack_the_same(ranks: int) -> None:
    from bench_ulysses import cases
    from workloads import WORKLOADS

    z_image = next(workload for workload in WORKLOADS if workload.name == "Z-Image")
    found = list(cases(z_image, 8, ranks, torch.device("cpu")))
    unpacking = [case for case in found if case.operator == "ulysses_unpack"]
    assert [case.labels["wire"] for case in unpacking] == ["qkv", "o"]
    for case in unpacking:
        assert all(map(torch.equal, case.ours(), case.eager()))  # type: ignore[call-overload]
    for case in found:
        if case.operator == "ulysses_pack":  # as many bytes: those of ours and those of the three apart
            apart = sum(tensor.nbytes for tensor in case.eager())  # type: ignore[attr-defined]
            filling = 16 * ranks * 5
            assert apart <= case.ours().numel() <= apart + filling  # type: ignore[attr-defined]


def test_candidates_merge_the_same() -> None:
    from bench_attention import cases
    from workloads import WORKLOADS

    for case in cases(WORKLOADS[0], 8, 2, torch.device("cpu")):
        for got, want in zip(case.ours(), case.eager()):  # type: ignore[call-overload]
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_wire_bytes(ranks: int) -> None:
    """Without scales and filling it is the tensors that leave; with them a little more; never less than others'."""
    from count_exchange import WIRES, wire_bytes
    from workloads import WORKLOADS

    for workload in WORKLOADS:
        sent = {name: wire_bytes(workload, ranks, float8) for name, float8 in WIRES.items()}
        own_length, own_heads = even_splits(workload.tokens, ranks)[0], even_splits(workload.heads, ranks)[0]
        out = own_length * (workload.heads - own_heads) * workload.head_dim
        back = (workload.tokens - own_length) * own_heads * workload.head_dim
        assert sent["bf16"] >= 2 * (3 * out + back)
        assert sent["bf16"] == pytest.approx(2 * 4 * back, rel=0.01)
        # of each row of 2 * head_dim bytes, half is left and a scale of 4 bytes comes
        rest = (workload.head_dim + 4) / (2 * workload.head_dim)
        assert sent["default"] / sent["bf16"] == pytest.approx((1 + 3 * rest) / 4, rel=1e-4)
        assert sent["all FP8"] / sent["bf16"] == pytest.approx(rest, rel=1e-4)


def test_counts() -> None:
    """In a process of its own, as it makes a process group and registers cache_dit's operators for CPU."""
    code = "import count_exchange as c\nfor name, (a, b) in c.counts().items(): print(name, a.total(), b.total())"
    paths = [ROOT, ROOT / "benchmarks", os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    lines = printed.stdout.splitlines()
    assert [line for line in lines if line.startswith("ours")] == [
        f"ours, {case} 2 4" for case in ("batch 1", "batch 2", "uneven lengths")
    ]


def test_workloads_are_what_diffusers_computes() -> None:
    diffusers = pytest.importorskip("diffusers")
    from workloads import WORKLOADS

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    inputs: dict[str, dict[str, Any]] = {
        "FLUX.1": {
            "hidden_states": empty(1, 4096, 64),
            "encoder_hidden_states": empty(1, 512, 4096),
            "pooled_projections": empty(1, 768),
            "timestep": empty(1),
            "guidance": empty(1),
            "img_ids": empty(4096, 3),
            "txt_ids": empty(512, 3),
        },
        "Qwen-Image": {
            "hidden_states": empty(1, 4096, 64),
            "encoder_hidden_states": empty(1, 128, 3584),
            "timestep": empty(1),
            "img_shapes": [(1, 64, 64)],
        },
        "Wan 2.1 14B": {
            "hidden_states": empty(1, 16, 21, 60, 104),
            "encoder_hidden_states": empty(1, 512, 4096),
            "timestep": empty(1),
        },
        "Z-Image": {"x": [empty(16, 1, 128, 128)], "cap_feats": [empty(128, 2560)], "t": empty(1)},
    }
    for workload in WORKLOADS:
        options = {"guidance_embeds": True} if workload.name == "FLUX.1" else {}
        with torch.device("meta"):
            transformer = getattr(diffusers, workload.transformer)(**options).to(torch.bfloat16).eval()
        assert sum(parameter.numel() for parameter in transformer.parameters()) == workload.parameters
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            transformer(**inputs[workload.name], return_dict=False)
        flops = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
        attention = flops.pop("aten.bmm")
        assert attention == pytest.approx(workload.attention_flops, rel=1e-3)
        assert sum(flops.values()) == pytest.approx(workload.linear_flops, rel=1e-3)
        # what scales with the tokens is self-attention; the rest is over text, or of the refiners'
        own = 4 * workload.layers * workload.tokens**2 * workload.hidden
        assert 0.9 * attention < own <= attention * 1.0001
