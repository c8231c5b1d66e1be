"""What is known about pipeline classes: where their transformers are, and how guidance calls them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

__all__ = ["DENOISERS", "PIPELINES", "PipelineEntry", "calls_branches_in_turn", "find_transformers"]

# Attributes that hold the denoisers, where they are not called transformer and transformer_2.
DENOISERS: dict[str, tuple[str, ...]] = {
    "Ideogram4Pipeline": ("transformer", "unconditional_transformer"),
    "KandinskyPriorPipeline": ("prior",),
    "KandinskyV22PriorEmb2EmbPipeline": ("prior",),
    "KandinskyV22PriorPipeline": ("prior",),
    "ShapEImg2ImgPipeline": ("prior",),
    "ShapEPipeline": ("prior",),
}


# Packages with transformers of their own, by the names of diffusers' classes, that call guidance branches in turn.
_ENGINES = ("sglang", "vllm_omni")


class PipelineEntry(NamedTuple):
    """One pipeline class.

    Args:
        transformer: Class of its denoisers.
        guidance: How guidance calls them: all branches in one batch; once per branch, which the pipeline names by
            ``cache_context``; once per branch in turn, without names; or not at all. Empty where it has not been tried.
        tried: Whether the tests run it, on a small pipeline of this class.
    """

    transformer: str
    guidance: str
    tried: bool = True


BATCH, NAMED, IN_TURN, NONE, UNKNOWN = "one batch", "named", "in turn", "none", ""
P = PipelineEntry

PIPELINES: dict[str, PipelineEntry] = {
    "AceStepPipeline": P("AceStepTransformer1DModel", BATCH),
    "AllegroPipeline": P("AllegroTransformer3DModel", BATCH),
    "AmusedImg2ImgPipeline": P("UVit2DModel", BATCH),
    "AmusedInpaintPipeline": P("UVit2DModel", BATCH),
    "AmusedPipeline": P("UVit2DModel", BATCH),
    "AnyFlowPipeline": P("AnyFlowTransformer3DModel", BATCH),
    "AuraFlowPipeline": P("AuraFlowTransformer2DModel", BATCH),
    "BriaFibo2Pipeline": P("BriaFibo2Transformer2DModel", IN_TURN),
    "BriaFiboEditPipeline": P("BriaFiboTransformer2DModel", BATCH),
    "BriaFiboPipeline": P("BriaFiboTransformer2DModel", BATCH),
    "BriaPipeline": P("BriaTransformer2DModel", BATCH),
    "ChromaImg2ImgPipeline": P("ChromaTransformer2DModel", IN_TURN),
    "ChromaInpaintPipeline": P("ChromaTransformer2DModel", IN_TURN),
    "ChromaPipeline": P("ChromaTransformer2DModel", IN_TURN),
    "ChronoEditPipeline": P("ChronoEditTransformer3DModel", IN_TURN),
    "CogVideoXFunControlPipeline": P("CogVideoXTransformer3DModel", BATCH),
    "CogVideoXImageToVideoPipeline": P("CogVideoXTransformer3DModel", BATCH),
    "CogVideoXPipeline": P("CogVideoXTransformer3DModel", BATCH),
    "CogVideoXVideoToVideoPipeline": P("CogVideoXTransformer3DModel", BATCH),
    "CogView3PlusPipeline": P("CogView3PlusTransformer2DModel", BATCH),
    "CogView4ControlPipeline": P("CogView4Transformer2DModel", IN_TURN),
    "CogView4Pipeline": P("CogView4Transformer2DModel", NAMED),
    "ConsisIDPipeline": P("ConsisIDTransformer3DModel", BATCH),
    "Cosmos2_5_PredictBasePipeline": P("CosmosTransformer3DModel", IN_TURN),
    "Cosmos2_5_TransferPipeline": P("CosmosTransformer3DModel", IN_TURN),
    "Cosmos2TextToImagePipeline": P("CosmosTransformer3DModel", IN_TURN),
    "Cosmos2VideoToWorldPipeline": P("CosmosTransformer3DModel", IN_TURN),
    "Cosmos3OmniPipeline": P("Cosmos3OmniTransformer", NAMED),
    "CosmosTextToWorldPipeline": P("CosmosTransformer3DModel", IN_TURN),
    "CosmosVideoToWorldPipeline": P("CosmosTransformer3DModel", IN_TURN),
    "DiTPipeline": P("DiTTransformer2DModel", BATCH),
    "EasyAnimateControlPipeline": P("EasyAnimateTransformer3DModel", UNKNOWN, tried=False),
    "EasyAnimateInpaintPipeline": P("EasyAnimateTransformer3DModel", UNKNOWN, tried=False),
    "EasyAnimatePipeline": P("EasyAnimateTransformer3DModel", BATCH),
    "ErnieImagePipeline": P("ErnieImageTransformer2DModel", BATCH),
    "Flux2KleinInpaintPipeline": P("Flux2Transformer2DModel", NAMED),
    "Flux2KleinKVPipeline": P("Flux2Transformer2DModel", NONE),
    "Flux2KleinPipeline": P("Flux2Transformer2DModel", NAMED),
    "Flux2Pipeline": P("Flux2Transformer2DModel", NONE),
    "FluxControlImg2ImgPipeline": P("FluxTransformer2DModel", NONE),
    "FluxControlInpaintPipeline": P("FluxTransformer2DModel", NONE),
    "FluxControlNetImg2ImgPipeline": P("FluxTransformer2DModel", NONE),
    "FluxControlNetInpaintPipeline": P("FluxTransformer2DModel", NONE),
    "FluxControlNetPipeline": P("FluxTransformer2DModel", IN_TURN),
    "FluxControlPipeline": P("FluxTransformer2DModel", NONE),
    "FluxFillPipeline": P("FluxTransformer2DModel", NONE),
    "FluxImg2ImgPipeline": P("FluxTransformer2DModel", IN_TURN),
    "FluxInpaintPipeline": P("FluxTransformer2DModel", IN_TURN),
    "FluxKontextInpaintPipeline": P("FluxTransformer2DModel", IN_TURN),
    "FluxKontextPipeline": P("FluxTransformer2DModel", IN_TURN),
    "FluxPipeline": P("FluxTransformer2DModel", NAMED),
    "GlmImagePipeline": P("GlmImageTransformer2DModel", IN_TURN),
    "HeliosPipeline": P("HeliosTransformer3DModel", NAMED),
    "HeliosPyramidPipeline": P("HeliosTransformer3DModel", NAMED),
    "HiDreamImagePipeline": P("HiDreamImageTransformer2DModel", BATCH),
    "HunyuanDiTControlNetPipeline": P("HunyuanDiT2DModel", BATCH),
    "HunyuanDiTPAGPipeline": P("HunyuanDiT2DModel", BATCH),
    "HunyuanDiTPipeline": P("HunyuanDiT2DModel", BATCH),
    "HunyuanImagePipeline": P("HunyuanImageTransformer2DModel", NAMED),
    "HunyuanImageRefinerPipeline": P("HunyuanImageTransformer2DModel", NAMED),
    "HunyuanSkyreelsImageToVideoPipeline": P("HunyuanVideoTransformer3DModel", IN_TURN),
    "HunyuanVideo15ImageToVideoPipeline": P("HunyuanVideo15Transformer3DModel", NAMED),
    "HunyuanVideo15Pipeline": P("HunyuanVideo15Transformer3DModel", NAMED),
    "HunyuanVideoFramepackPipeline": P("HunyuanVideoFramepackTransformer3DModel", IN_TURN),
    "HunyuanVideoImageToVideoPipeline": P("HunyuanVideoTransformer3DModel", IN_TURN),
    "HunyuanVideoPipeline": P("HunyuanVideoTransformer3DModel", NAMED),
    "Ideogram4Pipeline": P("Ideogram4Transformer2DModel", NONE),
    "JoyImageEditPipeline": P("JoyImageEditTransformer3DModel", IN_TURN),
    "JoyImageEditPlusPipeline": P("JoyImageEditPlusTransformer3DModel", BATCH),
    "Kandinsky5I2IPipeline": P("Kandinsky5Transformer3DModel", IN_TURN),
    "Kandinsky5I2VPipeline": P("Kandinsky5Transformer3DModel", IN_TURN),
    "Kandinsky5T2IPipeline": P("Kandinsky5Transformer3DModel", IN_TURN),
    "Kandinsky5T2VPipeline": P("Kandinsky5Transformer3DModel", IN_TURN),
    "Kandinsky6SRPipeline": P("Kandinsky6SRTransformer3DModel", NONE),
    "Kandinsky6TI2VAPipeline": P("Kandinsky6Transformer3DModel", NAMED),
    "KandinskyPriorPipeline": P("PriorTransformer", BATCH),
    "KandinskyV22PriorEmb2EmbPipeline": P("PriorTransformer", BATCH),
    "KandinskyV22PriorPipeline": P("PriorTransformer", BATCH),
    "Krea2Pipeline": P("Krea2Transformer2DModel", IN_TURN),
    "LattePipeline": P("LatteTransformer3DModel", BATCH),
    "LongCatAudioDiTPipeline": P("LongCatAudioDiTTransformer", IN_TURN),
    "LongCatImageEditPipeline": P("LongCatImageTransformer2DModel", NAMED),
    "LongCatImagePipeline": P("LongCatImageTransformer2DModel", NAMED),
    "LTX2ConditionPipeline": P("LTX2VideoTransformer3DModel", NAMED),
    "LTX2DFRPipeline": P("LTX2VideoTransformer3DModel", UNKNOWN, tried=False),
    "LTX2DFRTemporalRefinePipeline": P("LTX2VideoTransformer3DModel", UNKNOWN, tried=False),
    "LTX2HDRPipeline": P("LTX2VideoTransformer3DModel", NAMED),
    "LTX2ImageToVideoPipeline": P("LTX2VideoTransformer3DModel", NAMED),
    "LTX2InContextPipeline": P("LTX2VideoTransformer3DModel", NAMED),
    "LTX2Pipeline": P("LTX2VideoTransformer3DModel", NAMED),
    "LTXConditionPipeline": P("LTXVideoTransformer3DModel", BATCH),
    "LTXI2VLongMultiPromptPipeline": P("LTXVideoTransformer3DModel", UNKNOWN, tried=False),
    "LTXImageToVideoPipeline": P("LTXVideoTransformer3DModel", BATCH),
    "LTXPipeline": P("LTXVideoTransformer3DModel", BATCH),
    "LucyEditPipeline": P("WanTransformer3DModel", NAMED),
    "Lumina2Pipeline": P("Lumina2Transformer2DModel", IN_TURN),
    "LuminaPipeline": P("LuminaNextDiT2DModel", BATCH),
    "MochiPipeline": P("MochiTransformer3DModel", BATCH),
    "MotifVideoImage2VideoPipeline": P("MotifVideoTransformer3DModel", NAMED),
    "MotifVideoPipeline": P("MotifVideoTransformer3DModel", NAMED),
    "NucleusMoEImagePipeline": P("NucleusMoEImageTransformer2DModel", IN_TURN),
    "OmniGenPipeline": P("OmniGenTransformer2DModel", NONE),
    "OvisImagePipeline": P("OvisImageTransformer2DModel", NAMED),
    "PixArtAlphaPipeline": P("PixArtTransformer2DModel", BATCH),
    "PixArtSigmaPAGPipeline": P("PixArtTransformer2DModel", BATCH),
    "PixArtSigmaPipeline": P("PixArtTransformer2DModel", BATCH),
    "PRXPipeline": P("PRXTransformer2DModel", BATCH),
    "PRXPixelPipeline": P("PRXTransformer2DModel", BATCH),
    "QwenImage21Pipeline": P("QwenImage21Transformer2DModel", NAMED),
    "QwenImageControlNetInpaintPipeline": P("QwenImageTransformer2DModel", NAMED),
    "QwenImageControlNetPipeline": P("QwenImageTransformer2DModel", NAMED),
    "QwenImageEditInpaintPipeline": P("QwenImageTransformer2DModel", NAMED),
    "QwenImageEditPipeline": P("QwenImageTransformer2DModel", NAMED),
    "QwenImageEditPlusPipeline": P("QwenImageTransformer2DModel", NAMED),
    "QwenImageImg2ImgPipeline": P("QwenImageTransformer2DModel", NAMED),
    "QwenImageInpaintPipeline": P("QwenImageTransformer2DModel", NAMED),
    "QwenImageLayeredPipeline": P("QwenImageTransformer2DModel", NAMED),
    "QwenImagePipeline": P("QwenImageTransformer2DModel", NAMED),
    "SanaControlNetPipeline": P("SanaTransformer2DModel", BATCH),
    "SanaImageToVideoPipeline": P("SanaVideoTransformer3DModel", BATCH),
    "SanaPAGPipeline": P("SanaTransformer2DModel", BATCH),
    "SanaPipeline": P("SanaTransformer2DModel", BATCH),
    "SanaSprintImg2ImgPipeline": P("SanaTransformer2DModel", NONE),
    "SanaSprintPipeline": P("SanaTransformer2DModel", NONE),
    "SanaVideoPipeline": P("SanaVideoTransformer3DModel", BATCH),
    "SanaWMPipeline": P("SanaWMTransformer3DModel", BATCH),
    "ShapEImg2ImgPipeline": P("PriorTransformer", BATCH),
    "ShapEPipeline": P("PriorTransformer", BATCH),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": P("SkyReelsV2Transformer3DModel", NAMED),
    "SkyReelsV2DiffusionForcingPipeline": P("SkyReelsV2Transformer3DModel", NAMED),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": P("SkyReelsV2Transformer3DModel", NAMED),
    "SkyReelsV2ImageToVideoPipeline": P("SkyReelsV2Transformer3DModel", NAMED),
    "SkyReelsV2Pipeline": P("SkyReelsV2Transformer3DModel", NAMED),
    "StableAudio3AudioToAudioPipeline": P("StableAudio3DiTModel", NONE),
    "StableAudio3InpaintPipeline": P("StableAudio3DiTModel", NONE),
    "StableAudio3Pipeline": P("StableAudio3DiTModel", BATCH),
    "StableAudioPipeline": P("StableAudioDiTModel", BATCH),
    "StableDiffusion3ControlNetInpaintingPipeline": P("SD3Transformer2DModel", BATCH),
    "StableDiffusion3ControlNetPipeline": P("SD3Transformer2DModel", BATCH),
    "StableDiffusion3Img2ImgPipeline": P("SD3Transformer2DModel", BATCH),
    "StableDiffusion3InpaintPipeline": P("SD3Transformer2DModel", BATCH),
    "StableDiffusion3PAGImg2ImgPipeline": P("SD3Transformer2DModel", BATCH),
    "StableDiffusion3PAGPipeline": P("SD3Transformer2DModel", BATCH),
    "StableDiffusion3Pipeline": P("SD3Transformer2DModel", BATCH),
    "VisualClozeGenerationPipeline": P("FluxTransformer2DModel", NONE),
    "VisualClozePipeline": P("FluxTransformer2DModel", UNKNOWN, tried=False),
    "WanAnimatePipeline": P("WanAnimateTransformer3DModel", NAMED),
    "WanImageToVideoPipeline": P("WanTransformer3DModel", NAMED),
    "WanPipeline": P("WanTransformer3DModel", NAMED),
    "WanVACEPipeline": P("WanVACETransformer3DModel", NAMED),
    "WanVideoToVideoPipeline": P("WanTransformer3DModel", IN_TURN),
    "ZImageControlNetInpaintPipeline": P("ZImageTransformer2DModel", BATCH),
    "ZImageControlNetPipeline": P("ZImageTransformer2DModel", BATCH),
    "ZImageImg2ImgPipeline": P("ZImageTransformer2DModel", BATCH),
    "ZImageInpaintPipeline": P("ZImageTransformer2DModel", BATCH),
    "ZImageOmniPipeline": P("ZImageTransformer2DModel", BATCH),
    "ZImagePipeline": P("ZImageTransformer2DModel", BATCH),
}


def find_transformers(pipe: Any) -> list[nn.Module]:
    """Return the denoising transformers of a pipeline, in calling order; empty where there is none."""
    names = next(
        (DENOISERS[name] for name in _class_names(pipe) if name in DENOISERS), ("transformer", "transformer_2")
    )
    found = [getattr(pipe, name, None) for name in names]
    return [module for module in found if isinstance(module, nn.Module)]


def calls_branches_in_turn(pipe: Any, transformer: nn.Module | None = None) -> bool:
    """Whether a pipeline's guidance branches have to be told apart by the order of calls.

    Where there is no pipeline, and ``transformer`` is an engine's own version of a class of diffusers: whether the
    pipelines of this class there guide by a call per branch.
    """
    if pipe is None and type(transformer).__module__.partition(".")[0] in _ENGINES:
        name = type(transformer).__name__
        modes = {entry.guidance for entry in PIPELINES.values() if entry.transformer == name} - {UNKNOWN}
        return bool(modes) and modes <= {NAMED, IN_TURN}
    return any(name in PIPELINES and PIPELINES[name].guidance == IN_TURN for name in _class_names(pipe))


def _class_names(pipe: Any) -> list[str]:
    return [cls.__name__ for cls in type(pipe).__mro__]
