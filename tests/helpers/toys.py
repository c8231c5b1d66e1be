"""Small transformers of every forward pattern, and an executor of cached runs that shares nothing with the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cachedit import ForwardPattern

DIM = 8


class DualBlock(nn.Module):
    """Takes hidden and encoder states (patterns 0 to 2)."""

    def __init__(self, pattern: ForwardPattern, in_place: bool = False):
        super().__init__()
        self.pattern, self.in_place = pattern, in_place
        self.mix, self.cross = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, hidden_states, encoder_hidden_states, temb=None):
        pooled = hidden_states.mean(1, keepdim=True)
        change = torch.tanh(self.mix(hidden_states) + encoder_hidden_states.mean(1, keepdim=True))
        hidden_states = _changed(hidden_states, change, temb, self.in_place)
        if self.pattern.Return_H_Only:
            return hidden_states
        encoder = encoder_hidden_states + 0.2 * torch.tanh(self.cross(encoder_hidden_states) + pooled)
        return (hidden_states, encoder) if self.pattern.Return_H_First else (encoder, hidden_states)


class SingleBlock(nn.Module):
    """Takes hidden states only (patterns 3 to 5)."""

    def __init__(self, pattern: ForwardPattern, in_place: bool = False):
        super().__init__()
        self.pattern, self.in_place = pattern, in_place
        self.mix, self.side = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, hidden_states, temb=None):
        change = torch.tanh(self.mix(hidden_states))
        hidden_states = _changed(hidden_states, change, temb, self.in_place)
        if self.pattern.Return_H_Only:
            return hidden_states
        encoder = torch.tanh(self.side(hidden_states)).mean(1, keepdim=True)
        return (hidden_states, encoder) if self.pattern.Return_H_First else (encoder, hidden_states)


LOOPS: dict[str, Callable[[nn.ModuleList], Iterator[Any]]] = {
    "iterate": iter,
    "enumerate": lambda blocks: (block for _, block in enumerate(blocks)),
    "zip": lambda blocks: (block for block, _ in zip(blocks, range(len(blocks)), strict=True)),
    "list": lambda blocks: iter(list(blocks)),
    "slice": lambda blocks: iter(blocks[:]),
    "index": lambda blocks: (blocks[i] for i in range(len(blocks))),
    "halves": lambda blocks: iter([*blocks[:2], *blocks[2:]]),
}


def _changed(hidden_states, change, temb, in_place):
    if temb is not None:
        change = change * (1 + temb)
    return hidden_states.add_(0.2 * change) if in_place else hidden_states + 0.2 * change


class Toy(nn.Module):
    """A transformer with one block list; ``loop`` and ``keyword`` say how it calls its blocks."""

    def __init__(self, pattern=ForwardPattern.Pattern_0, depth=6, loop="iterate", keyword=True, in_place=False):
        super().__init__()
        cls = SingleBlock if pattern.Forward_H_only else DualBlock
        self.pattern, self.loop, self.keyword = pattern, loop, keyword
        self.blocks = nn.ModuleList(cls(pattern, in_place) for _ in range(depth))
        self.project = nn.Linear(DIM, DIM)

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        hidden, encoder = self.project(hidden_states), encoder_hidden_states
        temb = torch.sin(timestep.reshape(-1, 1, 1))
        for block in LOOPS[self.loop](self.blocks):
            streams = {"hidden_states": hidden, "encoder_hidden_states": encoder}
            streams = {name: streams[name] for name in self.pattern.In}
            output = block(**streams, temb=temb) if self.keyword else block(*streams.values(), temb)
            if self.pattern.Return_H_Only:
                hidden = output
            elif self.pattern.Return_H_First:
                hidden, encoder = output
            else:
                encoder, hidden = output
        return hidden + encoder.mean(1, keepdim=True)


class Shaped(nn.Module):
    """A transformer whose loop over its blocks does what ``shape`` says, mostly something that caching would break."""

    def __init__(self, shape, block=SingleBlock, pattern=ForwardPattern.Pattern_3):
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleList(block(pattern) for _ in range(6))

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        hidden, skips = hidden_states, []
        blocks = list(enumerate(self.blocks))
        if self.shape == "reversed":
            blocks = blocks[::-1]
        if self.shape == "twice":
            blocks = blocks + blocks
        if self.shape == "early exit":
            blocks = blocks[:4]
        for i, block in blocks:
            if self.shape == "between":
                hidden = hidden + 0.01
            if self.shape == "kept":
                skips.append(hidden)
                if i >= 3:
                    hidden.add_(skips[5 - i])
            if self.shape == "other parameter":
                _, hidden = block(hidden_states, encoder_hidden_states=hidden)
                continue
            hidden = block(hidden)
        return hidden


def make_toy(seed: int = 0, **kwargs: Any) -> Toy:
    torch.manual_seed(seed)
    return Toy(**kwargs).eval().requires_grad_(False)


def toy_inputs(step: int, total: int, batch: int = 2, tokens: int = 5, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of one denoising step: the same noise, drifting with the step."""
    generator = torch.Generator().manual_seed(seed)
    time = 1 - step / total
    return {
        "hidden_states": torch.randn(batch, tokens, DIM, generator=generator) * (0.5 + 0.5 * time),
        "encoder_hidden_states": torch.randn(batch, 3, DIM, generator=generator),
        "timestep": torch.full((batch,), time),
    }


def run_toy(model: nn.Module, total: int, **kwargs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**toy_inputs(step, total, **kwargs)) for step in range(total)]


class HookExecutor:
    """Runs a given mask with forward hooks on the blocks: TaylorSeer's derivative ladder, as its authors write it.

    On a reused step all blocks run, but what the last body block returns is replaced.
    """

    def __init__(self, lists: Sequence[tuple[nn.ModuleList, ForwardPattern]], Fn: int, Bn: int, order: int):
        blocks = [(block, pattern) for blocks, pattern in lists for block in blocks]
        self.head_end, self.body = blocks[Fn - 1], blocks[Fn : len(blocks) - Bn]
        self.order = order
        self.ladder: list[dict[str, torch.Tensor]] = []
        self.last = self.step = 0
        self.compute = True

    @contextmanager
    def hooked(self) -> Iterator[None]:
        first, last = self.body[0][0], self.body[-1][0]
        handles = [
            self.head_end[0].register_forward_hook(self._end_head),
            first.register_forward_pre_hook(self._enter, with_kwargs=True),
            last.register_forward_hook(self._leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, forwards: Sequence[Callable[[], Any]], mask: Sequence[int]) -> list[Any]:
        results = []
        with self.hooked():
            for self.step, (forward, compute) in enumerate(zip(forwards, mask, strict=True)):
                self.compute = bool(compute)
                results.append(forward())
        return results

    def _end_head(self, module: nn.Module, args: Any, output: Any) -> None:
        self.head_streams = self._named(self.head_end[1], output)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        names = self.body[0][1].In
        given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
        self.streams = {name: value.clone() for name, value in (self.head_streams | given).items()}

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        pattern = self.body[-1][1]
        streams = {name: self.streams[name] for name in pattern.Out}
        if self.compute:
            residual = {name: value - streams[name] for name, value in self._named(pattern, output).items()}
            new, gap = [residual], self.step - self.last
            for i in range(min(self.order, len(self.ladder))):
                new.append({name: (new[i][name] - self.ladder[i][name]) / gap for name in residual})
            self.ladder, self.last = new, self.step
            return output
        elapsed = self.step - self.last
        for i, rung in enumerate(self.ladder):
            streams = {name: value + rung[name] * elapsed**i / math.factorial(i) for name, value in streams.items()}
        ordered = tuple(streams[name] for name in pattern.Out)
        return ordered[0] if len(ordered) == 1 else ordered

    @staticmethod
    def _named(pattern: ForwardPattern, output: Any) -> dict[str, torch.Tensor]:
        return dict(zip(pattern.Out, output if isinstance(output, tuple) else (output,), strict=True))


def tiny_flux(double: int = 3, single: int = 3, seed: int = 0) -> nn.Module:
    """A FluxTransformer2DModel with random weights."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    return model.eval().requires_grad_(False)


def flux_inputs(step: int, total: int, batch: int = 1, tokens: int = 16, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, tokens, 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator),
        "pooled_projections": torch.randn(batch, 16, generator=generator),
        "timestep": torch.full((batch,), 1 - step / total),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def run_flux(model: nn.Module, steps: int = 6, **inputs: Any) -> list[torch.Tensor]:
    """What a FLUX transformer predicts at each step of a request; ``inputs`` go to :func:`flux_inputs`."""
    with torch.no_grad():
        return [model(**flux_inputs(step, steps, **inputs)).sample for step in range(steps)]


def tiny_flux_pipeline(seed: int = 0, **kwargs: Any) -> Any:
    """A FluxPipeline without text encoders: call it with ``prompt_embeds`` and ``pooled_prompt_embeds``."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    transformer = tiny_flux(seed=seed, **kwargs)
    torch.manual_seed(seed)
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=2, norm_num_groups=1).eval().requires_grad_(False)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_flux(pipe: Any, steps: int, size: int = 32, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Latents of one request."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        prompt_embeds=torch.randn(batch, 5, 16, generator=generator),
        pooled_prompt_embeds=torch.randn(batch, 16, generator=generator),
        num_inference_steps=steps,
        height=size,
        width=size,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images
