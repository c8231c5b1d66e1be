"""What is known about pipeline classes: where their transformers are, and how guidance calls them."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["DENOISERS", "SEPARATE_CFG", "calls_branches_in_turn", "find_transformers"]

# Attributes that hold the denoisers, where they are not called transformer and transformer_2.
DENOISERS: dict[str, tuple[str, ...]] = {
    "Ideogram4Pipeline": ("transformer", "unconditional_transformer"),
    "KandinskyPriorPipeline": ("prior",),
    "KandinskyV22PriorEmb2EmbPipeline": ("prior",),
    "KandinskyV22PriorPipeline": ("prior",),
    "ShapEImg2ImgPipeline": ("prior",),
    "ShapEPipeline": ("prior",),
}

# Pipelines that call their transformer once per guidance branch without naming the branch by cache_context.
SEPARATE_CFG: frozenset[str] = frozenset(
    {
        "BriaFibo2Pipeline",
        "ChromaImg2ImgPipeline",
        "ChromaInpaintPipeline",
        "ChromaPipeline",
        "ChronoEditPipeline",
        "CogView4ControlPipeline",
        "Cosmos2TextToImagePipeline",
        "Cosmos2VideoToWorldPipeline",
        "Cosmos2_5_PredictBasePipeline",
        "Cosmos2_5_TransferPipeline",
        "CosmosTextToWorldPipeline",
        "CosmosVideoToWorldPipeline",
        "FluxControlNetPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxKontextInpaintPipeline",
        "FluxKontextPipeline",
        "GlmImagePipeline",
        "HunyuanSkyreelsImageToVideoPipeline",
        "HunyuanVideoFramepackPipeline",
        "HunyuanVideoImageToVideoPipeline",
        "JoyImageEditPipeline",
        "Kandinsky5I2IPipeline",
        "Kandinsky5I2VPipeline",
        "Kandinsky5T2IPipeline",
        "Kandinsky5T2VPipeline",
        "Krea2Pipeline",
        "LongCatAudioDiTPipeline",
        "Lumina2Pipeline",
        "NucleusMoEImagePipeline",
        "WanVideoToVideoPipeline",
    }
)


def find_transformers(pipe: Any) -> list[nn.Module]:
    """Return the denoising transformers of a pipeline, in calling order; empty where there is none."""
    names = next(
        (DENOISERS[name] for name in _class_names(pipe) if name in DENOISERS), ("transformer", "transformer_2")
    )
    found = [getattr(pipe, name, None) for name in names]
    return [module for module in found if isinstance(module, nn.Module)]


def calls_branches_in_turn(pipe: Any) -> bool:
    """Whether a pipeline's guidance branches have to be told apart by the order of calls."""
    return any(name in SEPARATE_CFG for name in _class_names(pipe))


def _class_names(pipe: Any) -> list[str]:
    return [cls.__name__ for cls in type(pipe).__mro__]
