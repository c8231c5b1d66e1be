"""vLLM-Omni's pipelines: which of their modules denoise, and how the blocks of these are cached.

Facts are from vllm-project/vllm-omni at 0499470, 15d422a and d624074.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn

from ..adapter import BlockAdapter
from ..patch_functor import PatchFunctor
from ..pattern import ForwardPattern
from .special import InjectInBlocks, denoises_image, serve

__all__ = ["DENOISERS", "Denoiser"]


class Denoiser(NamedTuple):
    """A transformer of a pipeline, and how its blocks are cached.

    Args:
        path: Where the pipeline has it.
        blocks: Names of its block lists in calling order, with their patterns. Empty: as the transformer declares in
            ``_cache_dit_adapter_config``, or else as its class is known.
        in_turn: Whether guidance calls it once per branch, in turn; or a function of the pipeline that says so.
        check: :class:`BlockAdapter`'s ``check_forward_pattern``.
        modifiers: Fields of the cache configuration that differ: for all block lists, or one mapping for each.
        paired: Whether the pipeline has to be told to call both branches at every step.
        reads: Whether it reads prompts as well, and these calls are not told apart: then they are counted as steps.
        denoises: :class:`BlockAdapter`'s ``denoises``, which tells them apart.
        patch: :class:`BlockAdapter`'s ``patch_functor``.
    """

    path: str = "transformer"
    blocks: Mapping[str, ForwardPattern] = {}
    in_turn: bool | Callable[[Any], bool] = False
    check: bool | None = None
    modifiers: Sequence[Mapping[str, Any]] = ()
    paired: bool = False
    reads: bool = False
    denoises: Callable[..., bool] | None = None
    patch: PatchFunctor | None = None

    def find(self, pipeline: Any) -> nn.Module | None:
        """The transformer, or None where this pipeline has none there."""
        try:
            found = attrgetter(self.path)(pipeline)
        except AttributeError:
            return None
        return found if isinstance(found, nn.Module) else None

    def target(self, pipeline: Any, transformer: nn.Module) -> Any:
        """What to give to ``enable_cache``.

        Raises:
            NotImplementedError: If the transformer declares an adapter with blocks of its own that is not known here.
        """
        if self.blocks:
            in_turn = self.in_turn(pipeline) if callable(self.in_turn) else self.in_turn
            adapter = _adapter(transformer, self.blocks, in_turn)
            adapter.check_forward_pattern, adapter.denoises = self.check, self.denoises
            adapter.patch_functor = self.patch
            return adapter
        declared = getattr(transformer, "_cache_dit_adapter_config", None)
        if declared is None:
            return transformer
        adapter = _adapter(transformer, declared.block_forward_patterns, declared.has_separate_cfg)
        adapter.check_forward_pattern = declared.check_forward_pattern
        adapter_class = getattr(declared, "cached_adapter_cls", None)
        return adapter if adapter_class is None else serve(adapter_class, adapter)


def _adapter(transformer: nn.Module, blocks: Mapping[str, Any], in_turn: bool) -> BlockAdapter:
    patterns = [ForwardPattern[pattern.name] for pattern in blocks.values()]  # maybe cache_dit's own
    return BlockAdapter(
        transformer=transformer, blocks_name=list(blocks), forward_pattern=patterns, has_separate_cfg=in_turn
    )


P0, P1, P2, P3, P4, _ = ForwardPattern
_WAN = Denoiser(blocks={"blocks": P2}, in_turn=True)
_WAN_LOW_NOISE = _WAN._replace(path="transformer_2", modifiers=[{"max_warmup_steps": 2, "max_cached_steps": 20}])
_WAN_S2V = Denoiser(blocks={"blocks": P3}, in_turn=True, patch=InjectInBlocks())
_FLUX = Denoiser(blocks={"transformer_blocks": P1, "single_transformer_blocks": P1})
_FLUX2 = Denoiser(blocks={"transformer_blocks": P1, "single_transformer_blocks": P2})
_LONGCAT = _FLUX._replace(in_turn=True)
_LTX2 = Denoiser(blocks={"transformer_blocks": P0}, in_turn=True, check=False)  # audio in the encoder's place
_QWEN_IMAGE = Denoiser(blocks={"transformer_blocks": P1}, in_turn=True)
_HUNYUAN_VIDEO = Denoiser(blocks={"transformer_blocks": P0}, in_turn=True)

DENOISERS: dict[str, tuple[Denoiser, ...]] = {
    "BagelPipeline": (Denoiser("language_model.model", {"layers": P0}, reads=True),),
    "BooguImagePipeline": (
        Denoiser(
            blocks={"double_stream_layers": P0, "single_stream_layers": P3},
            in_turn=attrgetter("_cache_dit_separate_cfg"),
            check=False,
            modifiers=[{"Fn_compute_blocks": 2}, {"Fn_compute_blocks": 4}],
        ),
    ),
    "Cosmos3OmniDiffusersPipeline": (Denoiser(paired=True),),
    "Cosmos3OmniPipeline": (Denoiser(paired=True),),
    "DreamIDOmniPipeline": (Denoiser("model", {"fused_blocks": P0}, in_turn=True),),
    "ErnieImagePipeline": (Denoiser(blocks={"layers": P3}, check=False),),
    "Flux2KleinPipeline": (_FLUX2,),
    "Flux2Pipeline": (_FLUX2,),
    "FluxDMD2Pipeline": (_FLUX,),
    "FluxKontextPipeline": (_FLUX,),
    "FluxPipeline": (_FLUX,),
    "GlmImagePipeline": (Denoiser(blocks={"transformer_blocks": P0}, in_turn=True),),
    "HeliosPipeline": (_WAN,),
    "HunyuanImage3Pipeline": (Denoiser("model", {"layers": P4}, check=False, reads=True),),
    "HunyuanVideo15I2VPipeline": (_HUNYUAN_VIDEO,),
    "HunyuanVideo15Pipeline": (_HUNYUAN_VIDEO,),
    "Krea2Pipeline": (
        Denoiser(blocks={"transformer_blocks": P3}, in_turn=lambda pipeline: not pipeline.is_distilled, check=False),
    ),
    "LTX23ImageToVideoPipeline": (_LTX2,),
    "LTX23Pipeline": (_LTX2,),
    "LTX2I2VDMD2Pipeline": (_LTX2._replace(in_turn=False),),
    "LTX2ImageToVideoPipeline": (_LTX2,),
    "LTX2ImageToVideoTwoStagesPipeline": (_LTX2,),
    "LTX2Pipeline": (_LTX2,),
    "LTX2T2VDMD2Pipeline": (_LTX2._replace(in_turn=False),),
    "LTX2TwoStagesPipeline": (_LTX2,),
    "LongCatImageEditPipeline": (_LONGCAT,),
    "LongCatImagePipeline": (_LONGCAT,),
    "Magi2Pipeline": (Denoiser("transformer.block", {"layers": P3}),),
    "MammothModa2DiTPipeline": (Denoiser("gen_transformer", {"layers": P3}, in_turn=True, paired=True),),
    "QwenImageDMD2Pipeline": (_QWEN_IMAGE._replace(in_turn=False),),
    "QwenImageEditPipeline": (_QWEN_IMAGE,),
    "QwenImageEditPlusPipeline": (_QWEN_IMAGE,),
    "QwenImageLayeredPipeline": (_QWEN_IMAGE,),
    "QwenImagePipeline": (_QWEN_IMAGE,),
    "SenseNovaU1Pipeline": (Denoiser("language_model.model", {"layers": P3}, in_turn=True, denoises=denoises_image),),
    "StableAudioPipeline": (Denoiser(blocks={"transformer_blocks": P3}),),
    "StableDiffusion3Pipeline": (Denoiser(blocks={"transformer_blocks": P1}),),
    "Wan22I2VPipeline": (_WAN, _WAN_LOW_NOISE),
    "Wan22Pipeline": (_WAN, _WAN_LOW_NOISE),
    "Wan22S2VPipeline": (_WAN_S2V,),
    "Wan22TI2VPipeline": (_WAN, _WAN_LOW_NOISE),
    "Wan22VACEPipeline": (_WAN, _WAN_LOW_NOISE),
    "WanI2VDMD2Pipeline": (_WAN._replace(in_turn=False), _WAN_LOW_NOISE._replace(in_turn=False)),
    "WanPipeline": (_WAN, _WAN_LOW_NOISE),
    "WanT2VDMD2Pipeline": (_WAN._replace(in_turn=False), _WAN_LOW_NOISE._replace(in_turn=False)),
}
"""By the names of pipeline classes. Pipelines named DMD2 are distilled: they do not guide."""
