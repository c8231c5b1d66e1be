"""Offloading, casting and LoRA on a cached model, put on before and after, taken off in either order.

Without an accelerator both devices are the CPU. What accelerate offloads lies on the meta device between forwards, and
group offloading to disk leaves uninitialised memory behind, so weights that are not brought back show.
"""

import functools

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from diffusers.hooks import apply_group_offloading

import cachedit
from cachedit import DBPruneConfig, TaylorSeerCalibratorConfig
from cachedit.prune import PruneState
from holds import both_kinds, reused, reusing, same, traces
from toys import call_flux, run_flux, tiny_flux, tiny_flux_pipeline

CPU = torch.device("cpu")
EITHER_ORDER = pytest.mark.parametrize("enabled_first", [True, False], ids=["enabled first", "enabled last"])


def enable(model, kind, **fields):
    cachedit.enable_cache(model, reusing(kind, num_inference_steps=6, **fields), TaylorSeerCalibratorConfig())


@functools.cache
def expected(kind=None, **fields):
    model = tiny_flux()
    if kind is not None:
        enable(model, kind, **fields)
    return run_flux(model)


def group(**options):
    return lambda model, folder: apply_group_offloading(
        model, onload_device=CPU, offload_device=CPU, offload_to_disk_path=str(folder), **options
    )


OFFLOADS = {
    "accelerate": lambda model, folder: cpu_offload(model, CPU),
    "groups of one": group(offload_type="block_level", num_blocks_per_group=1),
    "groups of two": group(offload_type="block_level", num_blocks_per_group=2),
    "groups of five": group(offload_type="block_level", num_blocks_per_group=5),
    "leaves": group(offload_type="leaf_level"),
}


@both_kinds
@EITHER_ORDER
@pytest.mark.parametrize("tail", [0, 2])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading(kind, enabled_first, tail, offload, tmp_path):
    """Groups may reach from skipped blocks into the tail, whose weights the skipped ones would have loaded."""
    model, fields = tiny_flux(), {"Bn_compute_blocks": tail}
    if enabled_first:
        enable(model, kind, **fields)
        run_flux(model, 3)  # in the midst of a request
        cachedit.refresh_context(model)
    OFFLOADS[offload](model, tmp_path)
    if not enabled_first:
        enable(model, kind, **fields)
    for _ in range(2):
        for ours, theirs in zip(run_flux(model), expected(kind, **fields), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert reused(model) == [[2, 3, 4, 5]]
    cachedit.disable_cache(model)
    for ours, theirs in zip(run_flux(model), expected(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("why", ["never pruned", "moved too far"])
def test_blocks_computed_behind_pruned_ones_bring_their_weights(why, tmp_path, monkeypatch):
    fields = {"non_prune_block_ids": [3, 5]} if why == "never pruned" else {}
    if why == "moved too far":
        monkeypatch.setattr(PruneState, "_below_threshold", lambda self, number, diff: number not in (3, 5))
    outputs = []
    for offloaded in (True, False):
        model = tiny_flux(2, 4)
        if offloaded:
            OFFLOADS["groups of two"](model, tmp_path)
        enable(model, DBPruneConfig, **fields)
        outputs.append(run_flux(model))
        assert cachedit.summary(model, logging=False)[0].pruned_blocks == [0, 0, 3, 3, 3, 3]
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs)


@both_kinds
@pytest.mark.parametrize("hooks_go_first", [True, False])
def test_accelerate_s_hooks_come_off(kind, hooks_go_first):
    model, plain = tiny_flux(), tiny_flux()
    for each in (model, plain):
        cpu_offload(each, CPU)
    enable(model, kind)
    run_flux(model)
    for take_off in (remove_hook_from_submodules, cachedit.disable_cache)[:: 1 if hooks_go_first else -1]:
        take_off(model)
    remove_hook_from_submodules(plain)
    assert traces(model) == traces(plain) and type(model.forward) is type(plain.forward)


@both_kinds
@EITHER_ORDER
def test_model_offloading_of_a_pipeline(kind, enabled_first):
    pipe, plain, other = (tiny_flux_pipeline() for _ in range(3))
    enable_on(other, kind)
    cached = call_flux(other, 6)
    for put in (enable_on, offload)[:: 1 if enabled_first else -1]:
        put(pipe, kind)
    offload(plain, kind)
    for _ in range(2):
        assert torch.equal(call_flux(pipe, 6), cached)
    cachedit.disable_cache(pipe)
    assert torch.equal(call_flux(pipe, 6), call_flux(plain, 6))
    for each in (pipe, plain):
        each.remove_all_hooks()
    assert traces(pipe.transformer) == traces(plain.transformer)


def enable_on(pipe, kind):
    cachedit.enable_cache(pipe, reusing(kind))


def offload(pipe, kind):
    try:
        pipe.enable_model_cpu_offload(device="cpu")
    except RuntimeError as error:
        pytest.skip(f"diffusers refuses without an accelerator: {error}")


@both_kinds
@EITHER_ORDER
def test_layerwise_casting(kind, enabled_first):
    def cast(model, kind):
        model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)

    model, other = tiny_flux(), tiny_flux()
    for put in (enable, cast)[:: 1 if enabled_first else -1]:
        put(model, kind)
    cast(other, kind)
    enable(other, kind)
    assert same(run_flux(model), run_flux(other)) and reused(model) == [[2, 3, 4, 5]]
    plain = tiny_flux()
    cast(plain, kind)
    cachedit.disable_cache(model)
    assert same(run_flux(model), run_flux(plain)) and traces(model) == traces(plain)


class TestLoRA:
    """Loaded, fused, scaled and unloaded while the cache is enabled."""

    @pytest.fixture(autouse=True)
    def needs_peft(self):
        pytest.importorskip("peft", reason="diffusers loads LoRA through peft")

    @pytest.fixture
    def lora(self, tmp_path):
        from diffusers import FluxPipeline
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict

        model = tiny_flux()
        torch.manual_seed(1)
        targets = ["to_q", "to_v", "proj_mlp"]
        model.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False))
        FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(model))
        return tmp_path

    def loaded(self, lora, kind=None, enabled_first=True):
        pipe = tiny_flux_pipeline()
        if kind is not None and enabled_first:
            enable_on(pipe, kind)
            call_flux(pipe, 6)
        pipe.load_lora_weights(lora)
        if kind is not None and not enabled_first:
            enable_on(pipe, kind)
        return pipe

    @both_kinds
    def test_loaded_and_unloaded(self, kind, lora):
        pipe, plain = tiny_flux_pipeline(), tiny_flux_pipeline()
        enable_on(pipe, kind)
        without = call_flux(pipe, 6)
        pipe.load_lora_weights(lora)
        within = call_flux(pipe, 6)
        assert torch.equal(within, call_flux(self.loaded(lora, kind, enabled_first=False), 6))
        assert not torch.equal(within, without)
        assert reused(pipe) == [[2, 3, 4, 5]]
        pipe.unload_lora_weights()
        assert torch.equal(call_flux(pipe, 6), without)
        cachedit.disable_cache(pipe)
        assert torch.equal(call_flux(pipe, 6), call_flux(plain, 6))
        plain.load_lora_weights(lora)
        plain.unload_lora_weights()
        assert traces(pipe.transformer) == traces(plain.transformer)

    @both_kinds
    def test_disabled_while_loaded(self, kind, lora):
        pipe, plain = self.loaded(lora, kind), self.loaded(lora)
        call_flux(pipe, 6)
        cachedit.disable_cache(pipe)
        assert torch.equal(call_flux(pipe, 6), call_flux(plain, 6))
        assert traces(pipe.transformer) == traces(plain.transformer)

    @both_kinds
    def test_scaled_and_fused(self, kind, lora):
        pipe, other = self.loaded(lora, kind), self.loaded(lora, kind, enabled_first=False)
        for each in (pipe, other):
            each.set_adapters(each.get_active_adapters(), 0.5)
        scaled = call_flux(pipe, 6)
        assert torch.equal(scaled, call_flux(other, 6))
        for each in (pipe, other):
            each.fuse_lora()
        torch.testing.assert_close(call_flux(pipe, 6), call_flux(other, 6))
        pipe.unfuse_lora()
        torch.testing.assert_close(call_flux(pipe, 6), scaled)
