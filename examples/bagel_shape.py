"""A language model that denoises, as in BAGEL: its layers pass a key-value cache along. Runs offline, in seconds.

    python examples/bagel_shape.py

The model reads the prompt once, layer by layer into a key-value cache, and is then called in each denoising step on
the latents alone. Its layers take and return that cache, an object of which the engine knows nothing:

    hidden_states, past_key_values = layer(hidden_states=..., encoder_hidden_states=None, past_key_values=...)

This is pattern 0 without an encoder stream. The transformer is `language_model.model`, whose forward also reads the
prompts. Each reading is a request of its own: the first forward of a request computes every layer, and these must
all fill the key-value cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import cachedit_kernels as ck

DIM, HEADS, LATENT_TOKENS, LATENT_DIM, WORDS = 64, 4, 64, 16, 100


class KeyValueCache:
    """Keys and values of the prompt, by layer."""

    def __init__(self) -> None:
        self.entries: dict[int, tuple[Tensor, Tensor]] = {}


class Layer(nn.Module):
    """Reads the prompt with one MLP, and denoises with another."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number
        self.norm, self.norm_mlp = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp, self.mlp_gen = (
            nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.SiLU(), nn.Linear(4 * DIM, DIM)) for _ in range(2)
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        past_key_values: KeyValueCache | None = None,
        update: bool = False,
    ) -> tuple[Tensor, KeyValueCache]:
        query, key, value = self.qkv(self.norm(hidden_states)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.number in past_key_values.entries:
            old_key, old_value = past_key_values.entries[self.number]
            key, value = torch.cat([old_key, key], -2), torch.cat([old_value, value], -2)
        if update:
            past_key_values.entries[self.number] = key, value
        attended = scaled_dot_product_attention(query, key, value, is_causal=update)
        hidden_states = hidden_states + self.out(attended.transpose(1, 2).flatten(2))
        mlp = self.mlp if update else self.mlp_gen
        return hidden_states + mlp(self.norm_mlp(hidden_states)), past_key_values


class Backbone(nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(number) for number in range(depth))

    def forward(self, embeds: Tensor, past_key_values: KeyValueCache, update: bool) -> tuple[Tensor, KeyValueCache]:
        for layer in self.layers:
            embeds, past_key_values = layer(
                hidden_states=embeds, encoder_hidden_states=None, past_key_values=past_key_values, update=update
            )
        return embeds, past_key_values


class LanguageModel(nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        self.model = Backbone(depth)


class Bagel(nn.Module):
    def __init__(self, depth: int = 12):
        super().__init__()
        self.words, self.time = nn.Embedding(WORDS, DIM), nn.Linear(1, DIM)
        self.embed, self.predict = nn.Linear(LATENT_DIM, DIM), nn.Linear(DIM, LATENT_DIM)
        self.language_model = LanguageModel(depth)

    def read(self, prompt: list[int]) -> KeyValueCache:
        """Fill a cache with a prompt."""
        return self.language_model.model(self.words(torch.tensor([prompt])), KeyValueCache(), update=True)[1]

    def velocity(self, latents: Tensor, time: float, prompt: KeyValueCache) -> Tensor:
        """One denoising step of one guidance branch."""
        embeds = self.embed(latents) + self.time(torch.tensor([[time]]))
        return self.predict(self.language_model.model(embeds, prompt, update=False)[0])


@torch.inference_mode()
def generate(model: Bagel, prompt: list[int], steps: int, cached: bool, guidance: float = 2.0) -> Tensor:
    transformer = model.language_model.model
    contexts = []
    for text in (prompt, [0]):  # with the prompt, and without
        if cached:
            ck.refresh_context(transformer)  # every layer runs, and fills the key-value cache
        contexts.append(model.read(text))
    if cached:
        ck.refresh_context(transformer, num_inference_steps=steps)
    latents = torch.randn(1, LATENT_TOKENS, LATENT_DIM, generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        cond, uncond = (model.velocity(latents, 1 - step / steps, context) for context in contexts)
        latents = latents - (uncond + guidance * (cond - uncond)) / steps
    return latents


def main() -> None:
    torch.manual_seed(0)
    model = Bagel().eval()
    baseline = generate(model, [7, 42, 3], steps=28, cached=False)

    transformer = model.language_model.model
    adapter = ck.BlockAdapter(
        transformer=transformer,
        blocks=transformer.layers,
        forward_pattern=ck.ForwardPattern.Pattern_0,
        has_separate_cfg=True,  # one call per guidance branch, in turn
    )
    ck.enable_cache(
        adapter,
        ck.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=4, residual_diff_threshold=0.1),
        ck.TaylorSeerCalibratorConfig(taylorseer_order=1),
    )
    latents = generate(model, [7, 42, 3], steps=28, cached=True)
    print(f"relative error against the uncached run: {(latents - baseline).norm() / baseline.norm():.2e}")
    ck.summary(transformer)
    ck.disable_cache(transformer)
    assert torch.equal(generate(model, [7, 42, 3], steps=28, cached=False), baseline)


if __name__ == "__main__":
    main()
