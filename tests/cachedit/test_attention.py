import re
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import nn

import cachedit
from cachedit import BlockAdapter, DBCacheConfig, ForwardPattern, set_attn_backend
from cachedit.attention import _MASKED, _MASKLESS
from pipelines import build
from toys import call_flux, make_toy, tiny_flux, tiny_flux_pipeline


def backends(model):
    return {str(getattr(p, "_attention_backend", None)) for p in model.attn_processors.values()}


def default_backend():
    """What attention of a model without a backend of its own uses."""
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


@pytest.mark.filterwarnings("ignore::UserWarning")  # flex attention is for torch.compile
@pytest.mark.parametrize("name", ["_native_math", "_native_flash", "flex"])
def test_backends_of_torch_draw_the_same(name):
    pipe, baseline = tiny_flux_pipeline(), call_flux(tiny_flux_pipeline(), 2)
    set_attn_backend(pipe, name)
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


def test_backends_without_masks_are_those_that_raise_for_one():
    """By diffusers' own functions: they look at the mask before anything else."""
    tensors, mask = (torch.zeros(1, 2, 1, 8) for _ in range(3)), torch.ones(1, 1, 2, 2, dtype=torch.bool)
    tensors, raised = tuple(tensors), set()
    for backend in AttentionBackendName:
        try:
            _AttentionBackendRegistry._backends[backend](*tensors, attn_mask=mask)
        except ValueError as error:
            raised |= {backend.value} if "`attn_mask` is not supported" in str(error) else set()
        except Exception:  # without the package or the device
            pass
    assert raised == _MASKLESS


MASKED = ("AceStepPipeline", "BriaFiboPipeline", "ChromaPipeline", "ErnieImagePipeline", "HunyuanImagePipeline",
          "HunyuanVideo15Pipeline", "HunyuanVideoPipeline", "Ideogram4Pipeline", "JoyImageEditPlusPipeline",
          "Krea2Pipeline", "LongCatAudioDiTPipeline", "LTX2Pipeline", "LTXPipeline", "MotifVideoPipeline",
          "PRXPipeline", "QwenImage21Pipeline", "SanaVideoPipeline", "SanaWMPipeline")  # fmt: skip


def masked():
    """Transformer classes, each with whether every forward of a pipeline's request handed masks to the dispatcher."""
    native, running, done, found = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE], [], [], {}

    def watched(*args, **kwargs):
        if running:  # not an encoder of the pipeline
            running[0] |= kwargs["attn_mask"] is not None
        return native(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.NATIVE, watched)
        for name in (*MASKED, "QwenImagePipeline", "FluxPipeline"):
            tiny = build(name)
            tiny.pipe.transformer.register_forward_pre_hook(lambda *_: running.append(False))
            tiny.pipe.transformer.register_forward_hook(lambda *_: done.append(running.pop()))
            done.clear()
            tiny(2)
            found[type(tiny.pipe.transformer).__name__] = len(done) > 1 and all(done)
    return found


def test_models_that_need_masks_are_those_whose_pipelines_pass_one():
    others = {"QwenImageTransformer2DModel", "FluxTransformer2DModel"}
    assert masked() == dict.fromkeys(_MASKED, True) | dict.fromkeys(others, False)


def test_a_backend_without_masks_is_refused_where_one_is_needed():
    pipe = build("HunyuanVideoPipeline").pipe
    message = "'_native_flash' cannot be used here: it takes no mask, and HunyuanVideoTransformer3DModel is always "
    with pytest.raises(ValueError, match=f"{message}called with one .those that can: flex, native, _native_math[)]"):
        cachedit.enable_cache(pipe, DBCacheConfig(Fn_compute_blocks=1), attention_backend="_native_flash")
    assert backends(pipe.transformer) == {"None"} and not cachedit.summary(pipe, logging=False)
    set_attn_backend(pipe, "_native_math")
    set_attn_backend(build("QwenImagePipeline").pipe, "_native_flash")


def test_what_is_refused_is_refused_before_layers_are_quantized():
    pytest.importorskip("torchao")
    pipe, config = tiny_flux_pipeline(), cachedit.QuantizeConfig(quant_type="int8_weight_only")
    with pytest.raises(ValueError, match="attention_backend must be one of"):
        cachedit.enable_cache(pipe, attention_backend="fast", quantize_config=config)
    assert {type(parameter) for parameter in pipe.transformer.parameters()} == {nn.Parameter}


def test_a_model_that_has_no_choice():
    pipe = build("StableDiffusion3Pipeline").pipe
    with pytest.raises(ValueError, match=r"SD3Transformer2DModel has no attention whose .* be set .*can: native\)$"):
        set_attn_backend(pipe, "_native_math")
    set_attn_backend(pipe, "native")


def test_the_second_of_two_transformers_fails():
    class Fails(type(tiny_flux())):
        def set_attention_backend(self, name):
            raise RuntimeError("out of order")

    pipe = tiny_flux_pipeline()
    set_attn_backend(pipe, "native")
    pipe.transformer_2 = tiny_flux()
    pipe.transformer_2.__class__ = Fails
    with pytest.raises(ValueError, match="'_native_math' cannot be used here: out of order"):
        set_attn_backend(pipe, "_native_math")
    assert backends(pipe.transformer) == {"AttentionBackendName.NATIVE"} and backends(pipe.transformer_2) == {"None"}


class Unable(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Identity()
        self.attention.processor = SimpleNamespace(_attention_backend=None)

    def set_attention_backend(self, name):
        raise RuntimeError("flash-attn is not installed")


@pytest.mark.parametrize(
    ("target", "name", "error", "message"),
    [
        (tiny_flux, "fast", ValueError, "attention_backend must be one of flash, .*native.*sdpa.*, got 'fast'"),
        (tiny_flux, 3, TypeError, "attention_backend must be a name, got 3"),
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
