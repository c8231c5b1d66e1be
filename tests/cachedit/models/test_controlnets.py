"""What ControlNets add between blocks is neither added twice nor lost.

`test_families` compares the ControlNet pipelines with an independent executor, with one head block and no tail. Here
there is a tail as well, the ControlNets are seen to matter, and single residuals enter at each place by themselves.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cachedit
from cachedit import BlockAdapter, DBCacheConfig, ForwardPattern, TaylorSeerCalibratorConfig
from cachedit.adapter import plan_for
from executor import executing
from pipelines import BUILDERS, build
from toys import DIM, DualBlock, SingleBlock

STEPS = 8
MASK = [1, 1, 0, 1, 0, 0, 1, 0]
# Switches a ControlNet off, where its pipeline has an argument for that.
SCALE = {"Cosmos2_5_TransferPipeline": "controls_conditioning_scale"}
PIPELINES = [name for name in BUILDERS if "ControlNet" in name or name in SCALE]


def static(mask, **kwargs):
    return DBCacheConfig(max_warmup_steps=0, steps_computation_mask=mask, steps_computation_policy="static", **kwargs)


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_with_head_and_tail(name):
    tiny = build(name)
    transformer = tiny.pipe.transformer
    with_residuals = tiny(STEPS)
    without = tiny(STEPS, **{SCALE.get(name, "controlnet_conditioning_scale"): 0.0})
    assert (with_residuals - without).abs().max() > 0.01 * without.abs().max()
    blocks = {"Fn": 1, "Bn": 1}
    with executing({transformer: plan_for(transformer).sections}, MASK, tiny.branches, **blocks):
        expected = tiny(STEPS)
    config = static(MASK, Fn_compute_blocks=1, Bn_compute_blocks=1)
    cachedit.enable_cache(tiny.pipe, config, TaylorSeerCalibratorConfig())
    torch.testing.assert_close(tiny(STEPS), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert cachedit.summary(tiny.pipe, logging=False)[0].cached_steps == [2, 4, 5, 7]


# Of a small transformer: the argument that takes residuals, and the blocks after which they are added.
ARGUMENTS = {
    "FluxControlNetPipeline": (
        ("controlnet_block_samples", "transformer_blocks"),
        ("controlnet_single_block_samples", "single_transformer_blocks"),
    ),
    "QwenImageControlNetPipeline": (("controlnet_block_samples", "transformer_blocks"),),
    "StableDiffusion3ControlNetPipeline": (("block_controlnet_hidden_states", "transformer_blocks"),),
    "ZImageControlNetPipeline": (("controlnet_block_samples", "layers"),),
}


def recorded_call(tiny):
    """The arguments of the last call of a pipeline's transformer."""
    calls = []
    handle = tiny.pipe.transformer.register_forward_pre_hook(
        lambda _m, args, kw: calls.append((args, kw)), with_kwargs=True
    )
    tiny(2)
    handle.remove()
    return calls[-1]


def first_tensor(output):
    output = output[0] if isinstance(output, tuple) else output.sample
    return torch.stack(list(output)) if isinstance(output, (list, tuple)) else output


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_residual_at_each_block_by_itself(name):
    """With the same inputs at each step reuse is exact, so a residual that counts twice or not at all shows."""
    tiny = build(name)
    transformer = tiny.pipe.transformer
    args, kwargs = recorded_call(tiny)
    plain = {argument: None for argument, _ in ARGUMENTS[name]}
    mattered = []
    for argument, blocks in ARGUMENTS[name]:
        given = kwargs[argument]
        like = next(iter(given.values() if isinstance(given, dict) else given))
        residual = torch.randn(like.shape, generator=torch.Generator().manual_seed(1))
        for number in range(len(getattr(transformer, blocks))):
            samples = {i: residual * (i == number) for i in range(len(getattr(transformer, blocks)))}
            call = {**kwargs, **plain, argument: samples if isinstance(given, dict) else list(samples.values())}
            with torch.no_grad():
                expected = first_tensor(transformer(*args, **call))
                mattered.append(not torch.allclose(expected, first_tensor(transformer(*args, **kwargs | plain))))
                config = static([1, 0, 0], Fn_compute_blocks=1, Bn_compute_blocks=1, num_inference_steps=3)
                cachedit.enable_cache(transformer, config)
                outputs = [first_tensor(transformer(*args, **call)) for _ in range(3)]
            assert cachedit.summary(transformer, logging=False)[0].cached_steps == [1, 2]
            cachedit.disable_cache(transformer)
            for output in outputs:
                torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    # The last block of SD3 takes none.
    assert all(mattered[:-1]) and mattered[-1] != name.startswith("StableDiffusion3")


HEAD, BODY, TAIL = 2, 3, 2


class Controlled(nn.Module):
    """Adds ``residuals[i]`` after block i."""

    def __init__(self, pattern, in_place):
        super().__init__()
        self.pattern, self.in_place = pattern, in_place
        cls = SingleBlock if pattern.Forward_H_only else DualBlock
        self.blocks = nn.ModuleList(cls(pattern) for _ in range(HEAD + BODY + TAIL))

    def forward(self, hidden, encoder, residuals):
        for block, residual in zip(self.blocks, residuals, strict=True):
            hidden, encoder = self.call(block, hidden, encoder)
            if self.in_place:
                hidden += residual
            else:
                hidden = hidden + residual
        return hidden

    def call(self, block, hidden, encoder):
        output = block(hidden) if self.pattern.Forward_H_only else block(hidden, encoder)
        if self.pattern.Return_H_Only:
            return output, encoder
        return output if self.pattern.Return_H_First else output[::-1]

    def run(self, numbers, hidden, encoder, residuals):
        """Plainly: some blocks, and what is added between them."""
        for number in numbers:
            hidden, encoder = self.call(self.blocks[number], hidden, encoder)
            if number != numbers[-1]:
                hidden = hidden + residuals[number]
        return hidden, encoder


PLACES = {
    "in the head": 0,
    "at the first body block": HEAD - 1,
    "between body blocks": HEAD,
    "before the last body block": HEAD + BODY - 2,
    "at the last body block": HEAD + BODY - 1,
    "in the tail": HEAD + BODY,
    "after the tail": HEAD + BODY + TAIL - 1,
}


@pytest.mark.parametrize("in_place", [False, True], ids=["out of place", "in place"])
@pytest.mark.parametrize("pattern", list(ForwardPattern)[:4])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_residual_that_changes_from_step_to_step(place, pattern, in_place):
    """In head and tail, and where it enters or leaves the body, it is this step's; within, that of the stored step."""
    torch.manual_seed(0)
    model = Controlled(pattern, in_place).eval().requires_grad_(False)
    hidden, encoder, residual = torch.randn(1, 5, DIM), torch.randn(1, 3, DIM), torch.randn(1, 5, DIM)
    steps = [[scale * residual * (i == place) for i in range(len(model.blocks))] for scale in (1.0, -2.0)]
    head, body, tail = (
        range(HEAD), range(HEAD, HEAD + BODY), range(HEAD + BODY, len(model.blocks))
    )  # fmt: skip

    expected = []
    for now in steps:
        start, entered = model.run(head, hidden, encoder, now)
        start = start + now[head[-1]]
        if not expected:
            end, left = model.run(body, start, entered, now)
            stored, stored_encoder = end - start, left - entered
        end = start + stored + now[body[-1]]
        expected.append(model.run(tail, end, entered + stored_encoder, now)[0] + now[tail[-1]])

    adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=pattern)
    cachedit.enable_cache(
        adapter, static([1, 0], Fn_compute_blocks=HEAD, Bn_compute_blocks=TAIL, num_inference_steps=2)
    )
    with torch.no_grad():
        outputs = [model(hidden.clone(), encoder.clone(), now) for now in steps]
    for ours, theirs in zip(outputs, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    frozen = place in range(HEAD, HEAD + BODY - 1)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5) == frozen
