import re

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

import cachedit
from cachedit import BlockAdapter, DBCacheConfig, ForwardPattern, set_attn_backend
from toys import call_flux, make_toy, tiny_flux, tiny_flux_pipeline


def backends(model):
    return {str(getattr(p, "_attention_backend", None)) for p in model.attn_processors.values()}


def default_backend():
    """What attention of a model without a backend of its own uses."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return _AttentionBackendRegistry.get_active_backend()[0]


@pytest.mark.parametrize("of", [lambda pipe: pipe, lambda pipe: pipe.transformer, lambda pipe: [pipe.transformer],
                                lambda pipe: BlockAdapter(pipe=pipe),
                                lambda pipe: BlockAdapter(transformer=[pipe.transformer])],
                         ids=["pipeline", "transformer", "list", "adapter of a pipeline", "adapter"])  # fmt: skip
def test_only_this_transformer_changes(of):
    pipe, other, default = tiny_flux_pipeline(), tiny_flux(), default_backend()
    baseline = call_flux(pipe, 2)
    set_attn_backend(of(pipe), "_native_math")
    assert backends(pipe.transformer) == {"AttentionBackendName._NATIVE_MATH"}
    assert backends(other) == {"None"} and default_backend() is default
    torch.testing.assert_close(call_flux(pipe, 2), baseline, rtol=1e-4, atol=1e-5)


def test_while_the_cache_is_enabled(monkeypatch):
    pipe = tiny_flux_pipeline()
    cachedit.enable_cache(pipe, DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=9.0))
    set_attn_backend(pipe, "_native_math")
    used = []

    def watched(*args, backend=None, **kwargs):
        used.append(backend)
        return dispatch_attention_fn(*args, backend=backend, **kwargs)

    monkeypatch.setattr("diffusers.models.transformers.transformer_flux.dispatch_attention_fn", watched)
    call_flux(pipe, 2)
    assert [backend.value for backend in used] == ["_native_math"] * 7  # 6 blocks, then the head of a reused step


def test_as_an_argument_of_enable_cache():
    pipe, default = tiny_flux_pipeline(), default_backend()
    cachedit.enable_cache(pipe, attention_backend="_native_math")
    assert backends(pipe.transformer) == {"AttentionBackendName._NATIVE_MATH"} and default_backend() is default
    assert cachedit.summary(pipe, logging=False) == []  # without a cache_config it is all that is done
    model = make_toy()
    adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=ForwardPattern.Pattern_0)
    with pytest.raises(TypeError, match="attention_backend: Toy has no"):
        cachedit.enable_cache(adapter, DBCacheConfig(Fn_compute_blocks=1), attention_backend="native")
    assert type(model.blocks) is nn.ModuleList


def test_both_transformers_of_a_pipeline():
    pipe = tiny_flux_pipeline()
    pipe.transformer_2 = tiny_flux()
    set_attn_backend(pipe, "native")
    assert backends(pipe.transformer) == backends(pipe.transformer_2) == {"AttentionBackendName.NATIVE"}


def test_an_older_name():
    model = tiny_flux()
    set_attn_backend(model, "sdpa")
    assert backends(model) == {"AttentionBackendName.NATIVE"}
    config = cachedit.load_configs({"attention_backend": "sdpa"})
    cachedit.enable_cache(pipe := tiny_flux_pipeline(), **config)
    assert backends(pipe.transformer) == {"AttentionBackendName.NATIVE"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuDNN could be used")
@pytest.mark.parametrize("name", ["_sdpa_cudnn", "_native_cudnn", "_native_efficient"])
def test_what_needs_a_gpu_names_what_does_not(name):
    model = tiny_flux()
    message = f"'{name}' cannot be used here: it needs a CUDA device .those that can: (.*)[)]$"
    with pytest.raises(ValueError, match=message) as caught:
        set_attn_backend(model, name)
    assert backends(model) == {"None"}
    usable = re.search(message, str(caught.value))[1].split(", ")
    assert {"native", "_native_math"} <= set(usable) and not {"_native_cudnn", "_native_efficient"} & set(usable)
    for name in usable:
        set_attn_backend(model, name)


def test_none_changes_nothing():
    model = tiny_flux()
    set_attn_backend(model)
    assert backends(model) == {"None"}


class Unable(nn.Module):
    def set_attention_backend(self, name):
        raise RuntimeError("flash-attn is not installed")


@pytest.mark.parametrize(
    ("target", "name", "error", "message"),
    [
        (tiny_flux, "fast", ValueError, "`backend='fast'` must be one of the following: .*native"),
        (Unable, "flash", ValueError, "attention_backend 'flash' cannot be used here: flash-attn is not installed"),
        (make_toy, "native", TypeError, "attention_backend: Toy has no set_attention_backend, as models of diffusers"),
        (object, "native", TypeError, "attention_backend: object has no set_attention_backend"),
        (lambda: BlockAdapter(transformer=[tiny_flux(), make_toy()], forward_pattern=ForwardPattern.Pattern_0),
         "native", TypeError, "Toy has no"),
    ],
)  # fmt: skip
def test_what_cannot_be_set_changes_nothing(target, name, error, message):
    target, default = target(), default_backend()
    with pytest.raises(error, match=message):
        set_attn_backend(target, name)
    assert default_backend() is default
    for model in getattr(target, "transformer", [target]):
        if hasattr(model, "attn_processors"):  # diffusers' own
            assert backends(model) == {"None"}
