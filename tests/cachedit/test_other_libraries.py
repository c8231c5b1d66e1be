"""Transformers that other libraries have quantized, under the cache: bitsandbytes, and stand-ins for Nunchaku's."""

import copy
import logging

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, ZImageTransformer2DModel
from torch import nn

import cachedit
from cachedit import DBCacheConfig
from holds import reused
from pipelines import build
from toys import call_flux, tiny_flux_pipeline


def distance(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def mask(steps):
    return DBCacheConfig(Fn_compute_blocks=1, steps_computation_mask=steps, steps_computation_policy="static")


@pytest.fixture
def nf4(tmp_path, monkeypatch):
    """A pipeline in float32, and one with its transformer as diffusers loads it by its BitsAndBytesConfig."""
    pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed: pip install cachedit-kernels[bitsandbytes]"
    )
    from diffusers import BitsAndBytesConfig
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # bitsandbytes has kernels for it; diffusers asks for a GPU
        monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *args, **kwargs: None)
    pipe, other = tiny_flux_pipeline(), tiny_flux_pipeline()
    torch.manual_seed(0)
    pipe.transformer = FluxTransformer2DModel(
        **{"patch_size": 1, "in_channels": 8, "num_layers": 3, "num_single_layers": 3, "attention_head_dim": 32},
        **{"num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16},
        axes_dims_rope=(8, 12, 12),
    )
    pipe.transformer.eval().requires_grad_(False).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        # smaller than a block of 64 weights, which the CPU's kernel refuses
        llm_int8_skip_modules=["x_embedder", "context_embedder", "time_text_embed", "proj_out"],
    )
    other.transformer = FluxTransformer2DModel.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": device}, dtype=torch.float32
    )
    return pipe.to(device), other.to(device)


def packed(model):
    return [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]


def test_nf4_of_bitsandbytes_under_the_cache(nf4):
    plain, pipe = nf4
    assert len(packed(pipe.transformer)) > 50
    alone = call_flux(pipe, 4)
    assert 1e-3 < distance(alone, call_flux(plain, 4)) < 1.5e-2
    for each in nf4:
        cachedit.enable_cache(each, mask([1, 1, 0, 0]))
    assert 1e-3 < distance(call_flux(pipe, 4), call_flux(plain, 4)) < 1.5e-2
    assert reused(pipe) == reused(plain) == [[2, 3]]
    cachedit.disable_cache(pipe)
    assert torch.equal(call_flux(pipe, 4), alone)


def test_layers_of_bitsandbytes_stay_as_they_are(nf4, caplog):
    pytest.importorskip("torchao")
    _, pipe = nf4
    before = packed(pipe.transformer)
    with caplog.at_level(logging.WARNING, "cachedit"):
        cachedit.quantize(pipe, quant_type="int8_weight_only", exclude_layers=None)
    assert packed(pipe.transformer) == before and "are quantized or cut already, and stay as they are" in caplog.text


class JoinedSingleBlock(nn.Module):
    """Takes and returns both streams as one, as Nunchaku's single blocks do."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        text, image = self.block(hidden_states[:, 5:], hidden_states[:, :5], temb, image_rotary_emb)
        return torch.cat([text, image], dim=1)


class NunchakuFluxTransformer2DModelV2(FluxTransformer2DModel):
    """A stand-in: Nunchaku's class and base class, its blocks' signatures, its loops."""

    def patch(self):
        for i, block in enumerate(self.single_transformer_blocks):
            self.single_transformer_blocks[i] = JoinedSingleBlock(block)
        return self

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids,
                guidance=None, joint_attention_kwargs=None, return_dict=True):  # fmt: skip
        hidden_states = self.x_embedder(hidden_states)
        temb = self.time_text_embed(timestep * 1000, pooled_projections)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        rotary = self.pos_embed(torch.cat((txt_ids, img_ids)))
        for block in self.transformer_blocks:
            encoder_hidden_states, hidden_states = block(
                hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=temb,
                image_rotary_emb=rotary, joint_attention_kwargs=joint_attention_kwargs)  # fmt: skip
        tokens = encoder_hidden_states.shape[1]
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        for block in self.single_transformer_blocks:
            hidden_states = block(hidden_states=hidden_states, temb=temb, image_rotary_emb=rotary,
                                  joint_attention_kwargs=joint_attention_kwargs)  # fmt: skip
        return (self.proj_out(self.norm_out(hidden_states[:, tokens:], temb)),)


def test_a_transformer_of_nunchaku_under_the_cache():
    pipe, plain = tiny_flux_pipeline(), tiny_flux_pipeline()
    pipe.transformer.__class__ = NunchakuFluxTransformer2DModelV2
    pipe.transformer.patch()
    torch.testing.assert_close(call_flux(pipe, 4), call_flux(plain, 4), rtol=1e-4, atol=1e-5)
    cachedit.enable_cache(pipe, mask([1, 0, 0, 1]))
    assert 1e-4 < distance(call_flux(pipe, 4), call_flux(plain, 4)) < 0.5
    assert reused(pipe) == [[1, 2], [1, 2]]  # a section for each list
    cachedit.disable_cache(pipe)
    torch.testing.assert_close(call_flux(pipe, 4), call_flux(plain, 4), rtol=1e-4, atol=1e-5)


class QwenBlock(nn.Module):
    """Takes a mask of the text's tokens, and no modulation index, as Nunchaku's blocks do."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb=None,
                joint_attention_kwargs=None):  # fmt: skip
        return self.block(hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb,
                          joint_attention_kwargs)  # fmt: skip


class Offloads:
    """What ``set_offload`` makes: copies of blocks that stand on the GPU for those of the list."""

    def __init__(self, blocks):
        self.buffers = [copy.deepcopy(block) for block in blocks]

    def get_block(self, index):
        return self.buffers[index]


class NunchakuQwenImageTransformer2DModel(QwenImageTransformer2DModel):
    """A stand-in: Nunchaku's class and base class, its block's signature, its loop."""

    offload_manager = None

    def patch(self):
        for i, block in enumerate(self.transformer_blocks):
            self.transformer_blocks[i] = QwenBlock(block)
        return self

    def forward(self, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None, timestep=None,
                img_shapes=None, txt_seq_lens=None, guidance=None, attention_kwargs=None,
                return_dict=True):  # fmt: skip
        hidden_states = self.img_in(hidden_states)
        text = self.txt_in(self.txt_norm(encoder_hidden_states))
        temb = self.time_text_embed(timestep.to(hidden_states.dtype), hidden_states)
        rotary = self.pos_embed(img_shapes, max_txt_seq_len=text.shape[1], device=hidden_states.device)
        for i, block in enumerate(self.transformer_blocks):
            if self.offload_manager is not None:
                block = self.offload_manager.get_block(i)
            text, hidden_states = block(
                hidden_states=hidden_states, encoder_hidden_states=text,
                encoder_hidden_states_mask=encoder_hidden_states_mask, temb=temb, image_rotary_emb=rotary,
                joint_attention_kwargs=attention_kwargs)  # fmt: skip
        return (self.proj_out(self.norm_out(hidden_states, temb)),)


class NunchakuZImageTransformer2DModel(ZImageTransformer2DModel):
    """A stand-in: Nunchaku's class and base class; it changes parts of blocks, and keeps the loop."""


@pytest.mark.parametrize(
    ("pipeline", "cls"),
    [("QwenImagePipeline", NunchakuQwenImageTransformer2DModel), ("ZImagePipeline", NunchakuZImageTransformer2DModel)],
)
def test_other_transformers_of_nunchaku_are_served_as_their_base_class(pipeline, cls):
    tiny, base = build(pipeline), build(pipeline)
    tiny.pipe.transformer.__class__ = cls
    getattr(tiny.pipe.transformer, "patch", lambda: None)()
    plain = tiny(4)
    torch.testing.assert_close(plain, base(4), rtol=1e-4, atol=1e-5)
    for each in (tiny, base):
        cachedit.enable_cache(each.pipe, mask([1, 0, 0, 1]))
    torch.testing.assert_close(tiny(4), base(4), rtol=1e-4, atol=1e-5)
    assert reused(tiny.pipe) == reused(base.pipe) == [[1, 2]]
    cachedit.disable_cache(tiny.pipe)
    assert torch.equal(tiny(4), plain)


def test_blocks_that_nunchaku_swaps_for_offloading_are_not_cached_and_said_so(caplog):
    tiny = build("QwenImagePipeline")
    tiny.pipe.transformer.__class__ = NunchakuQwenImageTransformer2DModel
    model = tiny.pipe.transformer.patch()
    plain = tiny(4)
    model.offload_manager = Offloads(model.transformer_blocks)
    cachedit.enable_cache(tiny.pipe, DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=1))
    with caplog.at_level(logging.WARNING, "cachedit"):
        assert torch.equal(tiny(4), plain) and torch.equal(tiny(4), plain)
    assert "the cache never triggered" in caplog.text and reused(tiny.pipe) == [[]]


class NunchakuFluxTransformer2dModel(FluxTransformer2DModel):
    """A stand-in: Nunchaku's first class, whose list holds one module that runs all blocks."""


def test_a_model_of_one_block_is_refused():
    pipe = tiny_flux_pipeline()
    pipe.transformer.__class__ = NunchakuFluxTransformer2dModel
    with pytest.raises(ValueError, match=r"all its blocks in one call.*NunchakuFluxTransformer2DModelV2"):
        cachedit.enable_cache(pipe, mask([1, 0, 0, 1]))
