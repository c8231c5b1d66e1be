"""Caching in a pipeline of your own, with `cachedit_kernels` as the only import. Runs offline, in a second.

    python examples/custom_pipeline.py

A model that diffusers does not know needs a BlockAdapter: where the blocks are, and how they pass their streams on.
Without a diffusers pipeline nothing tells when a request starts, so each one begins with `refresh_context`.
"""

import torch
from torch import nn

import cachedit_kernels as ck


class Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x) * (1 + time))


class Denoiser(nn.Module):
    def __init__(self, dim: int = 256, depth: int = 24):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, time)
        return self.out(x)


@torch.inference_mode()
def generate(model: nn.Module, steps: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(1, 128, 256, generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        x = x - model(x, torch.tensor(1 - step / steps)) / steps
    return x


def main() -> None:
    torch.manual_seed(0)
    model = Denoiser().eval()
    baseline = generate(model, steps=28)

    adapter = ck.BlockAdapter(
        transformer=model,
        blocks=model.blocks,
        forward_pattern=ck.ForwardPattern.Pattern_3,  # hidden -> hidden
        check_forward_pattern=False,  # these blocks call their stream `x`
    )
    ck.enable_cache(
        adapter,
        ck.DBCacheConfig(Fn_compute_blocks=2, max_warmup_steps=4, residual_diff_threshold=0.1),
        ck.TaylorSeerCalibratorConfig(taylorseer_order=1),
    )
    for seed in (0, 1):
        ck.refresh_context(model, num_inference_steps=28)
        cached = generate(model, steps=28, seed=seed)
        if seed == 0:
            error = (cached - baseline).norm() / baseline.norm()
            print(f"relative error against the uncached run: {error:.2e}")
        ck.summary(model)
    ck.disable_cache(model)
    assert torch.equal(generate(model, steps=28), baseline)


if __name__ == "__main__":
    main()
