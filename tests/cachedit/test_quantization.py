"""Quantization: how far outputs move, which layers are picked, and that nothing is half-applied."""

import logging
import sys

import pytest
import torch
from torch import nn

import cachedit
from cachedit import DBCacheConfig, ParallelismConfig, QuantizeConfig, quantize
from cachedit.quantization.types import QUANT_TYPES, find_type
from holds import reused
from ranks import run_ranks
from toys import call_flux, flux_inputs, make_toy, run_toy, tiny_flux, tiny_flux_pipeline

pytest.importorskip("torchao")

# The largest relative L2 distance to float32 of a small FLUX's latents after 4 steps. Weights of 8 bits in rows are
# good for half a step of 1/127 of the row's largest; E4M3 has 3 bits of mantissa; 4 bits have 7 steps to each side.
BOUNDS = {"float8_weight_only": 4e-3, "int8_per_row": 1e-3, "int8_per_tensor": 1.2e-3, "int8_weight_only": 8e-4,
          "int4": 1.5e-2}  # fmt: skip
cpu_types = pytest.mark.parametrize("quant_type", BOUNDS)


def distance(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def kinds(model):
    """Dotted name of each linear layer: what its weight is."""
    return {name: type(m.weight).__name__ for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def quantized(model):
    return [name for name, kind in kinds(model).items() if kind != "Parameter"]


def mask(steps):
    return DBCacheConfig(Fn_compute_blocks=1, steps_computation_mask=steps, steps_computation_policy="static")


@cpu_types
def test_distance_to_float32(quant_type):
    pipe, plain = tiny_flux_pipeline(), tiny_flux_pipeline()
    quantize(pipe.transformer, quant_type=quant_type)
    assert 0 < distance(call_flux(pipe, 4), call_flux(plain, 4)) < BOUNDS[quant_type]


@cpu_types
def test_distance_to_float32_with_the_cache_on_both(quant_type):
    pipe, plain = tiny_flux_pipeline(), tiny_flux_pipeline()
    config = QuantizeConfig(quant_type=quant_type)
    assert cachedit.enable_cache(pipe, mask([1, 1, 0, 0]), quantize_config=config) is pipe
    cachedit.enable_cache(plain, mask([1, 1, 0, 0]))
    assert 0 < distance(call_flux(pipe, 4), call_flux(plain, 4)) < BOUNDS[quant_type]
    assert reused(pipe) == [[2, 3]]
    cachedit.disable_cache(pipe)
    assert len(quantized(pipe.transformer)) == 60


@pytest.mark.parametrize("quant_type", ["int8_per_row", "int8_weight_only"])
def test_a_toy(quant_type):
    model, plain = make_toy(), make_toy()
    quantize(model, quant_type=quant_type, repeated_blocks=[type(model.blocks[0]).__name__], exclude_layers=[])
    assert quantized(model) and all(name.startswith("blocks.") for name in quantized(model))
    for ours, theirs in zip(run_toy(model, 3), run_toy(plain, 3)):
        assert 0 < distance(ours, theirs) < 0.02


def test_on_a_cached_model():
    pipe, before = tiny_flux_pipeline(), tiny_flux_pipeline()
    cachedit.enable_cache(pipe, mask([1, 0, 0]))
    call_flux(pipe, 3)
    quantize(pipe, quant_type="int8_weight_only")
    cachedit.enable_cache(before, mask([1, 0, 0]), quantize_config=QuantizeConfig(quant_type="int8_weight_only"))
    assert torch.equal(call_flux(pipe, 3), call_flux(before, 3))


def test_compiled():
    model, inputs = tiny_flux(1, 1), flux_inputs(0, 4)
    quantize(model, quant_type="int8_weight_only")
    cachedit.enable_cache(model, DBCacheConfig(Fn_compute_blocks=1, num_inference_steps=4))
    with torch.no_grad():
        expected = model(**inputs).sample
        cachedit.refresh_context(model)
        for blocks in (model.transformer_blocks, model.single_transformer_blocks):
            for block in blocks:
                block.compile(backend="aot_eager")
        torch.testing.assert_close(model(**inputs).sample, expected)


def parallel_latents():
    pipe = tiny_flux_pipeline()
    cachedit.enable_cache(pipe, mask([1, 0, 1, 0]), parallelism_config=ParallelismConfig(ulysses_size=2),
                          quantize_config=QuantizeConfig(quant_type="int8_weight_only"))  # fmt: skip
    return call_flux(pipe, 4).numpy(), len(quantized(pipe.transformer))


def test_under_ulysses():
    pipe = tiny_flux_pipeline()
    cachedit.enable_cache(pipe, mask([1, 0, 1, 0]), quantize_config=QuantizeConfig(quant_type="int8_weight_only"))
    for latents, count in run_ranks(parallel_latents, 2):
        torch.testing.assert_close(torch.from_numpy(latents), call_flux(pipe, 4), rtol=1e-4, atol=1e-5)
        assert count == 60


def refused_on_ranks():
    pipe = tiny_flux_pipeline()
    for types in (("int8", "int8"), ("int8", "float8")):  # differ by rank
        config = QuantizeConfig(quant_type=types[torch.distributed.get_rank()])
        with pytest.raises((ValueError, RuntimeError), match="quant"):
            sizes = ParallelismConfig(tp_size=2) if types[0] == types[1] else ParallelismConfig(ulysses_size=2)
            cachedit.enable_cache(pipe, parallelism_config=sizes, quantize_config=config)
    return quantized(pipe.transformer)


def test_what_one_rank_refuses_all_refuse():
    assert run_ranks(refused_on_ranks, 2) == [[], []]


def in_blocks(name):
    return name.startswith(("transformer_blocks.", "single_transformer_blocks."))


@pytest.mark.parametrize(
    ("fields", "picked"),
    [
        ({}, in_blocks),
        ({"exclude_layers": ["ff", "norm"]}, lambda name: in_blocks(name) and not ("ff" in name or "norm" in name)),
        ({"exclude_layers": ["blocks.1."]}, lambda name: in_blocks(name) and "blocks.1." not in name),
        ({"filter_fn": lambda layer, name: layer.in_features == 128}, lambda name: name.endswith(("net.2",))),
        ({"repeated_blocks": ["FluxSingleTransformerBlock"]}, lambda name: name.startswith("single")),
        ({"regional_quantize": False}, lambda name: "embed" not in name),
        ({"regional_quantize": False, "exclude_layers": None}, lambda name: True),
    ],
    ids=lambda value: ",".join(value) or "default" if isinstance(value, dict) else "",
)  # fmt: skip
def test_which_layers(fields, picked):
    model = tiny_flux()
    assert quantize(model, quant_type="int8_weight_only", **fields) is model
    assert quantized(model) == [name for name in kinds(model) if picked(name)] != []


def test_precision_plan():
    model = tiny_flux(1, 1)
    quantize(model, quant_type="int8", precision_plan={"to_q": "float8_weight_only", "to": "int4"})
    found = kinds(model)
    assert found["transformer_blocks.0.attn.to_q"] == "Float8Tensor"
    assert found["transformer_blocks.0.attn.to_k"] == "IntxUnpackedToInt8Tensor"
    assert found["single_transformer_blocks.0.proj_mlp"] == "Int8Tensor"
    assert found["x_embedder"] == "Parameter"


def test_a_precision_plan_for_whole_models_is_not_looked_at_and_said_so(caplog):
    model = nn.Sequential(nn.Linear(32, 32))
    with caplog.at_level(logging.WARNING, "cachedit"):
        quantize(model, quant_type="int8", regional_quantize=False, precision_plan={"0": "int4"})
    assert kinds(model) == {"0": "Int8Tensor"} and "precision_plan is for regional_quantize=True" in caplog.text


def test_components_of_a_pipeline():
    pipe = tiny_flux_pipeline()
    pipe.text_encoder = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    config = QuantizeConfig("ao", "int8", components_to_quantize={"text_encoder": {"quant_type": "int8_wo"}})
    assert config.strify() == "<text_encoder:int8_weight_only>"
    assert config.component_quant_types() == {"text_encoder": "int8_weight_only"}
    quantize(pipe, config)
    assert quantized(pipe.text_encoder) == ["0", "1"] and quantized(pipe.transformer) == []
    quantize(pipe, quant_type="int8", components_to_quantize=["transformer"])
    assert len(quantized(pipe.transformer)) == 60
    with pytest.raises(ValueError, match="components_to_quantize: FluxPipeline has no module 'vea'"):
        quantize(pipe, quant_type="int8", components_to_quantize=["vea"])


def test_layers_that_are_quantized_stay(caplog):
    model = quantize(tiny_flux(), quant_type="int8_weight_only")
    with torch.no_grad():
        before = model(**flux_inputs(0, 4)).sample
        with caplog.at_level(logging.WARNING, "cachedit"):
            quantize(model, quant_type="int4")
        assert torch.equal(model(**flux_inputs(0, 4)).sample, before)
    assert "60 linear layers are quantized or cut already, and stay as they are" in caplog.text


def test_adapters_of_peft_stay_and_can_still_be_switched():
    peft = pytest.importorskip("peft")
    pipe, plain, without = (tiny_flux_pipeline() for _ in range(3))
    for each in (pipe, plain):
        torch.manual_seed(1)
        adapter = peft.LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False)
        each.transformer.add_adapter(adapter)
    with torch.no_grad():
        expected = call_flux(plain, 4)
    cachedit.enable_cache(pipe, mask([1, 1, 0, 0]), quantize_config=QuantizeConfig(quant_type="int8_weight_only"))
    names = quantized(pipe.transformer)
    assert "transformer_blocks.0.attn.to_q.base_layer" in names and not any("lora_" in name for name in names)
    cachedit.disable_cache(pipe)
    assert 0 < distance(call_flux(pipe, 4), expected) < BOUNDS["int8_weight_only"]
    assert distance(expected, call_flux(without, 4)) > 10 * BOUNDS["int8_weight_only"]
    pipe.transformer.disable_adapters()
    quantize(without, quant_type="int8_weight_only")
    assert torch.equal(call_flux(pipe, 4), call_flux(without, 4))
    pipe.transformer.delete_adapters("default")
    assert torch.equal(call_flux(pipe, 4), call_flux(without, 4))


def test_adapters_by_other_names_stay():
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("to_q", "lora_down", "lora_up", "explora")})
    quantize(model, quant_type="int8", filter_fn=lambda layer, name: True)
    assert quantized(model) == ["to_q", "explora"]


def test_sizes_that_do_not_fit_stay():
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32))
    quantize(model, quant_type="int4")
    assert quantized(model) == ["0"]
    row = QUANT_TYPES["float8_per_row"]
    assert row.fits(48, 16) and not row.fits(48, 8) and row.fallback == "float8_per_tensor"


def test_without_a_cache_config_no_cache_is_enabled():
    pipe = tiny_flux_pipeline()
    cachedit.enable_cache(pipe, quantize_config=QuantizeConfig(quant_type="int8"))
    assert cachedit.summary(pipe, logging=False) == [] and len(quantized(pipe.transformer)) == 60


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, ValueError, r"'float8_per_row' needs a GPU of compute capability 8.9 or higher, but .* is on cpu"),
        ({"quant_type": "float8_blockwise"}, ValueError, "needs a GPU of compute capability 8.9"),
        ({"quant_type": "int4_weight_only"}, ValueError, "needs a GPU of compute capability 8.0"),
        ({"quant_type": "int8", "precision_plan": {"ff": "float8"}}, ValueError, "'float8_per_row' needs a GPU"),
        ({"quant_type": "fp9"}, ValueError, "quant_type must be one of float8_per_row, .*, got 'fp9'"),
        ({"quant_type": 8}, TypeError, "quant_type must be a string, got 8"),
        ({"quant_type": "svdq_int4_r32"}, NotImplementedError, "quant_type 'svdq_int4_r32' is not available"),
        ({"quant_type": "nvfp4"}, NotImplementedError, "'nvfp4' is not available .* int4 and int4_weight_only; SVDQ"),
        ({"backend": "bnb"}, ValueError, "backend must be one of auto, torchao, ao, got 'bnb'"),
        ({"backend": "cache-dit"}, NotImplementedError, "backend 'cache-dit' is not available"),
        ({"serialize_to": "x"}, NotImplementedError, "serialize_to is for SVDQuant"),
        ({"verbose": 1}, TypeError, "verbose must be True or False, got 1"),
        ({"filter_fn": "ff"}, TypeError, "filter_fn must be a function"),
        ({"precision_plan": {"ff": "fp9"}}, ValueError, r"precision_plan\['ff'\] must be one of"),
        ({"precision_plan": {1: "int8"}}, TypeError, "precision_plan must map parts of layer names to types"),
        ({"components_to_quantize": []}, ValueError, "components_to_quantize names no component"),
        ({"components_to_quantize": {1: {}}}, TypeError, "components_to_quantize must be a list of names"),
        ({"components_to_quantize": {"vae": None}}, TypeError, "vae must be a dictionary of fields, got None"),
        ({"components_to_quantize": {"transformer": {"type": 1}}}, ValueError, "transformer: type is none of"),
        ({"quant_type": "int8", "repeated_blocks": ["Block"]}, ValueError, "Flux.* has no modules of the classes"),
        ({"quant_type": "int8", "exclude_layers": [""]}, ValueError, "no linear .* 60 left out by exclude_layers"),
        ({"quant_typ": "int8"}, TypeError, "quant_typ"),
    ],
)  # fmt: skip
def test_refusals_change_nothing(fields, error, message):
    model = tiny_flux()
    with pytest.raises(error, match=message):
        quantize(model, **fields)
    assert quantized(model) == []


def test_what_torchao_cannot_do_is_found_before_anything_is_changed(monkeypatch):
    def fails(q):
        raise AssertionError("no such kernel")

    monkeypatch.setitem(QUANT_TYPES, "int4", QUANT_TYPES["int4"]._replace(make=fails))
    model = tiny_flux()
    with pytest.raises(ValueError, match=r"'int4' cannot be used here: single_.*proj_out.*: no such kernel"):
        quantize(model, quant_type="int8", precision_plan={"proj_out": "int4"})
    assert quantized(model) == []


def test_other_refusals():
    with pytest.raises(TypeError, match="quantize takes quantize_config or single fields, not both; got quant_type"):
        quantize(tiny_flux(), QuantizeConfig(), quant_type="int8")
    with pytest.raises(TypeError, match="quantize_config must be a QuantizeConfig, got dict"):
        cachedit.enable_cache(tiny_flux_pipeline(), quantize_config={"quant_type": "int8"})
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module or a pipeline with a transformer, got object"):
        quantize(object(), quant_type="int8")
    with pytest.raises(ValueError, match="is on the meta device: quantize before offloading"):
        quantize(tiny_flux().to("meta"), quant_type="int8")


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r'pip install "cachedit-kernels\[quantization\]"'):
        quantize(tiny_flux(), quant_type="int8")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("float8", "float8_per_row"), ("fp8_w8a8_dq", "float8_per_row"), ("FLOAT8_WO", "float8_weight_only"),
     ("float8_blockwise", "float8_per_block"), ("int8", "int8_per_row"), ("int8_w8a16_wo", "int8_weight_only"),
     ("int4_w4a8_dq", "int4"), ("int4_w4a16_wo", "int4_weight_only")],
)  # fmt: skip
def test_other_names(name, meant):
    assert find_type(name) == meant and QuantizeConfig(quant_type=name).strify() == meant


def test_torchao_takes_the_configuration_of_every_type():
    from torchao import quantization
    from torchao.core.config import AOBaseConfig

    assert all(isinstance(row.make(quantization), AOBaseConfig) for row in QUANT_TYPES.values())


def test_updates():
    config = QuantizeConfig().update(quant_type="int8", verbose=None)
    assert config == QuantizeConfig(quant_type="int8") == QuantizeConfig(**config.as_dict())
    with pytest.raises(TypeError, match="QuantizeConfig has no field 'quant_typ'"):
        config.update(quant_typ="int8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_on_a_gpu(quant_type):
    row = QUANT_TYPES[quant_type]
    if row.capability is not None and torch.cuda.get_device_capability() < row.capability:
        pytest.skip(f"needs compute capability {row.capability}")
    layer = nn.Sequential(nn.Linear(256, 256)).to("cuda", torch.bfloat16).requires_grad_(False)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    expected = layer(x)
    quantize(layer, quant_type=quant_type)
    assert 0 < distance(layer(x).float(), expected.float()) < (0.15 if "int4" in quant_type else 0.06)


@pytest.mark.parametrize("offload", ["groups", "model"])
def test_quantized_then_offloaded(offload):
    from diffusers.hooks import apply_group_offloading

    pipe, other, cpu = tiny_flux_pipeline(), tiny_flux_pipeline(), torch.device("cpu")
    for each in (pipe, other):
        cachedit.enable_cache(each, mask([1, 1, 0, 0]), quantize_config=QuantizeConfig(quant_type="int8_weight_only"))
    if offload == "groups":
        apply_group_offloading(pipe.transformer, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    else:
        accelerate = pytest.importorskip("accelerate")
        accelerate.cpu_offload_with_hook(pipe.transformer, cpu)
    assert torch.equal(call_flux(pipe, 4), call_flux(other, 4)) and reused(pipe) == [[2, 3]]
