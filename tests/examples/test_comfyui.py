"""The ComfyUI nodes, on a stand-in for what they use of ComfyUI: patchers, wrappers, and a sampler around a model."""

import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from cachedit.controller import controller_of

FOLDER = Path(__file__).parents[2] / "examples" / "comfyui"
SETTINGS = {"threshold": 0.3, "first_blocks": 1, "warmup_steps": 3, "max_in_a_row": 3, "taylorseer_order": 1}


class WrappersMP:
    OUTER_SAMPLE, APPLY_MODEL = "outer_sample", "apply_model"


class Executor:
    """Calls the wrappers one within the other, all arguments by position as ComfyUI has them."""

    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        first, *rest = self.wrappers
        return first(Executor(self.original, self.class_obj, rest), *args, **kwargs)


class ModelPatcher:
    """Clones share the model."""

    def __init__(self, model):
        self.model = model
        self.wrappers, self.attachments = {}, {}

    def clone(self):
        copy = ModelPatcher(self.model)
        copy.wrappers = {kind: {k: list(v) for k, v in keys.items()} for kind, keys in self.wrappers.items()}
        copy.attachments = dict(self.attachments)
        return copy

    def add_wrapper_with_key(self, wrapper_type, key, wrapper):
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, wrapper_type, key):
        self.wrappers.get(wrapper_type, {}).pop(key, None)

    def set_attachments(self, key, attachment):
        self.attachments[key] = attachment

    def get_attachment(self, key):
        return self.attachments.get(key, None)

    def remove_attachments(self, key):
        self.attachments.pop(key, None)

    def get_model_object(self, name):
        return getattr(self.model, name)

    def run(self, kind, original, class_obj, *args):
        wrappers = [wrapper for found in self.wrappers.get(kind, {}).values() for wrapper in found]
        return Executor(original, class_obj, wrappers)(*args)


class DoubleBlock(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.img, self.txt = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, img, txt, vec, pe, attn_mask=None):
        txt = txt + 0.1 * torch.tanh(self.txt(txt))
        return img + 0.1 * torch.tanh(self.img(img) + txt.mean(1, keepdim=True)) * vec, txt


class SingleBlock(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x, vec, pe, attn_mask=None):
        return x + 0.1 * torch.tanh(self.mix(x)) * vec


class Flux(nn.Module):
    """ComfyUI's FLUX, as far as its blocks are concerned: names, streams, and how the lists follow one another."""

    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList(DoubleBlock() for _ in range(4))
        self.single_blocks = nn.ModuleList(SingleBlock() for _ in range(4))

    def forward(self, x, timestep, context, control=None, transformer_options=None):
        img, txt, vec = x, context, 1 + 0.1 * timestep.reshape(-1, 1, 1)
        for _, block in enumerate(self.double_blocks):
            img, txt = block(img=img, txt=txt, vec=vec, pe=None, attn_mask=None)
        img = torch.cat((txt, img), 1)
        for _, block in enumerate(self.single_blocks):
            img = block(img, vec=vec, pe=None, attn_mask=None)
        return img[:, txt.shape[1] :]


class BaseModel:
    def __init__(self):
        torch.manual_seed(0)
        self.diffusion_model = Flux().eval()

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None):
        return self.diffusion_model(x, t, c_crossattn, control, transformer_options)


@torch.inference_mode()
def sample(patcher, steps=10, batched=True, calls_per_step=1, seed=0):
    """A guided sampling, both branches in one batch or one after the other."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 6, 8, generator=generator)
    prompts = torch.randn(2, 3, 8, generator=generator)
    guider = SimpleNamespace(model_patcher=patcher)

    def denoise(x, sigma):
        out = {}
        for batch in ([1, 0],) if batched else ([0], [1]):
            inputs = (torch.cat([x] * len(batch)), sigma.expand(len(batch)), None, prompts[batch], None)
            options = {"cond_or_uncond": batch, "sigmas": sigma, "uuids": [f"uuid-{branch}" for branch in batch]}
            output = patcher.run("apply_model", patcher.model.apply_model, patcher.model, *inputs, options)
            out.update(zip(batch, output.chunk(len(batch))))
        return out[1] + 2 * (out[0] - out[1])

    def outer_sample(noise, latent_image, sampler, sigmas, *rest):
        x = noise
        for now, then in pairwise(sigmas):
            for _ in range(calls_per_step):
                x = x + (then - now) / calls_per_step * denoise(x, now.reshape(1))
        return x

    sigmas = torch.linspace(1, 0, steps + 1)
    return patcher.run("outer_sample", outer_sample, guider, noise, None, None, sigmas, None, None, True, seed)


@pytest.fixture
def nodes(monkeypatch):
    extension = ModuleType("comfy.patcher_extension")
    extension.WrappersMP = WrappersMP
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", extension)
    spec = importlib.util.spec_from_file_location("comfyui_cachedit", FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS


def run(nodes, name, **inputs):
    """What ComfyUI does with a node: its inputs by name, one function named by FUNCTION."""
    node = nodes[name]()
    assert set(inputs) == set(node.INPUT_TYPES()["required"])
    outputs = getattr(node, node.FUNCTION)(**inputs)
    outputs = outputs["result"] if isinstance(outputs, dict) else outputs
    assert len(outputs) == len(node.RETURN_TYPES)
    return outputs[0]


def rows(report):
    """(blocks, branch, calls, reused) of each row."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines()[2:]]
    return [(blocks, branch, int(calls), int(reused)) for blocks, branch, calls, reused, *_ in cells]


def test_enable_stats_disable(nodes):
    plain = ModelPatcher(BaseModel())
    baseline = sample(plain)
    cached = run(nodes, "CacheditEnable", model=plain, mask="none", **SETTINGS)
    assert run(nodes, "CacheditStats", model=cached, samples=None) == "nothing has been sampled yet"
    samples = sample(cached)
    assert 0 < (samples - baseline).abs().max() < 0.1
    table = rows(run(nodes, "CacheditStats", model=cached, samples=samples))
    assert [row[:3] for row in table] == [
        ("Flux.double_blocks", "uncond+cond", 10),
        ("Flux.single_blocks", "uncond+cond", 10),
    ]
    assert all(reused > 3 for *_, reused in table)
    assert controller_of(plain.model.diffusion_model) is None  # only while it samples
    assert torch.equal(sample(plain), baseline) and plain.wrappers == plain.attachments == {}
    assert torch.equal(sample(cached), samples)  # nothing is left over from one to the next
    off = run(nodes, "CacheditDisable", model=cached)
    assert torch.equal(sample(off), baseline)
    assert run(nodes, "CacheditStats", model=off, samples=None) == "there is no cache on this model"


def test_branches_one_after_the_other(nodes):
    plain = ModelPatcher(BaseModel())
    cached = run(nodes, "CacheditEnable", model=plain, mask="none", **SETTINGS)
    sample(cached, batched=False)
    table = rows(run(nodes, "CacheditStats", model=cached, samples=None))
    assert {row[1:3] for row in table} == {("cond", 10), ("uncond", 10)}
    assert all(reused > 3 for *_, reused in table)


def test_a_sampler_that_calls_twice_per_step(nodes):
    cached = run(nodes, "CacheditEnable", model=ModelPatcher(BaseModel()), mask="none", **SETTINGS)
    sample(cached, calls_per_step=2)
    assert {row[2] for row in rows(run(nodes, "CacheditStats", model=cached, samples=None))} == {20}


def test_a_mask_and_enabling_again(nodes):
    first = run(nodes, "CacheditEnable", model=ModelPatcher(BaseModel()), mask="none", **SETTINGS)
    second = run(nodes, "CacheditEnable", model=first, mask="ultra", **SETTINGS | {"taylorseer_order": 0})
    assert [len(keys["cachedit"]) for keys in second.wrappers.values()] == [1, 1]
    sample(second, steps=28)
    assert all(calls == 28 and reused > 10 for *_, calls, reused in rows(second.get_attachment("cachedit").report))
    assert first.get_attachment("cachedit").report == "nothing has been sampled yet"


def test_a_sampling_that_fails(nodes):
    patcher = ModelPatcher(BaseModel())
    cached = run(nodes, "CacheditEnable", model=patcher, mask="none", **SETTINGS | {"first_blocks": 9})
    with pytest.raises(ValueError, match="Fn_compute_blocks"):
        sample(cached)
    cached = run(nodes, "CacheditEnable", model=patcher, mask="none", **SETTINGS)
    patcher.model.diffusion_model.single_blocks[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(cached)
    assert controller_of(patcher.model.diffusion_model) is None
