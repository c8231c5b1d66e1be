"""Caching a transformer by itself: torch is all that is needed, no diffusers. Runs offline, in a second.

    python examples/transformer_only.py

Nothing describes the model: its block list is learnt by watching the first forward. The loop, with guidance by a second
call, is the program's own, so each call says which request and branch it belongs to.
"""

import torch
from torch import nn

import cachedit


class Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x) * (1 + condition)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm_mlp(x) * (1 + condition))


class Transformer(nn.Module):
    def __init__(self, dim: int = 64, depth: int = 12):
        super().__init__()
        self.prompts = nn.Embedding(10, dim)
        self.time = nn.Linear(1, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, time: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        condition = self.time(time[:, None, None]) + self.prompts(prompt)[:, None]
        for block in self.blocks:
            x = block(x, condition)
        return self.out(x)


@torch.inference_mode()
def generate(model: nn.Module, prompt: int, steps: int, guidance: float = 2.0, cached: bool = False) -> torch.Tensor:
    x = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(prompt))
    for step in range(steps):
        time = torch.tensor([1 - step / steps])
        noise = {}
        for branch, number in (("cond", prompt), ("uncond", 0)):
            arguments = (x, time, torch.tensor([number]))
            if cached:
                with cachedit.request(model, (prompt, branch), num_inference_steps=steps):
                    noise[branch] = model(*arguments)
            else:
                noise[branch] = model(*arguments)
        x = x - (noise["uncond"] + guidance * (noise["cond"] - noise["uncond"])) / steps
    return x


def main() -> None:
    torch.manual_seed(0)
    model = Transformer().eval()
    baseline = generate(model, prompt=3, steps=28)

    settings = {"Fn_compute_blocks": 1, "max_warmup_steps": 4, "residual_diff_threshold": 0.1}
    cachedit.enable_cache(model, *cachedit.load_cache_config(settings | {"enable_taylorseer": True}))
    cached = generate(model, prompt=3, steps=28, cached=True)
    print(f"relative error against the uncached run: {(cached - baseline).norm() / baseline.norm():.2e}")
    for branch in ("cond", "uncond"):
        with cachedit.request(model, (3, branch)):
            (stats,) = cachedit.summary(model, logging=False)
        print(f"{branch}: {len(stats.cached_steps)} of 28 steps reused, {stats.bytes_held / 1e3:.0f} kB held")
        cachedit.drop_request(model, (3, branch))
    cachedit.disable_cache(model)
    assert torch.equal(generate(model, prompt=3, steps=28), baseline)


if __name__ == "__main__":
    main()
