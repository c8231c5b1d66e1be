"""The model table: per transformer class, its block lists, their patterns, and which of them share a decision."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..patch_functor import PatchFunctor
from ..pattern import ForwardPattern
from .patches import LattePatch

__all__ = ["MODELS", "UNCOVERED", "BlockList", "ModelEntry", "find_entry"]


class BlockList(NamedTuple):
    """One block list.

    Args:
        name: Its dotted name within the transformer.
        pattern: What its blocks take and return.
        hidden: What they call the hidden_states stream.
        encoder: What they call the encoder_hidden_states stream.
    """

    name: str
    pattern: ForwardPattern
    hidden: str = "hidden_states"
    encoder: str = "encoder_hidden_states"

    @property
    def streams(self) -> tuple[str, str]:
        """The blocks' names of both streams."""
        return self.hidden, self.encoder


class ModelEntry(NamedTuple):
    """One transformer class.

    Args:
        sections: Groups of block lists in calling order. The lists of a group carry the same streams and share one
            decision, so a reused step skips the later ones whole; groups decide separately.
        patch: Changes that a transformer needs while the cache is on, where its loop does more than call its blocks.
    """

    sections: tuple[tuple[BlockList, ...], ...]
    patch: type[PatchFunctor] | None = None


def _linked(*lists: BlockList) -> ModelEntry:
    """Lists that carry the same streams: one decision."""
    return ModelEntry((lists,))


def _separate(*lists: BlockList) -> ModelEntry:
    """Lists whose streams differ, often since they are joined in between: a decision for each."""
    return ModelEntry(tuple((item,) for item in lists))


P0, P1, P2, P3, _, _ = ForwardPattern
B = BlockList

IMAGE = {
    "AuraFlowTransformer2DModel": _separate(B("joint_transformer_blocks", P1), B("single_transformer_blocks", P3)),
    "BriaFibo2Transformer2DModel": _separate(B("layers", P3, hidden="x")),
    "BriaFiboTransformer2DModel": _separate(B("transformer_blocks", P1), B("single_transformer_blocks", P3)),
    "BriaTransformer2DModel": _linked(B("transformer_blocks", P1), B("single_transformer_blocks", P1)),
    "ChromaTransformer2DModel": _separate(B("transformer_blocks", P1), B("single_transformer_blocks", P3)),
    "CogView3PlusTransformer2DModel": _separate(B("transformer_blocks", P0)),
    "CogView4Transformer2DModel": _separate(B("transformer_blocks", P0)),
    "DiTTransformer2DModel": _separate(B("transformer_blocks", P3)),
    "ErnieImageTransformer2DModel": _separate(B("layers", P3, hidden="x")),
    "Flux2Transformer2DModel": _separate(B("transformer_blocks", P1), B("single_transformer_blocks", P3)),
    # Its five blocks per kind of token, before these, are always computed.
    "Flux3Transformer2DModel": _separate(B("single_transformer_blocks", P1)),
    "FluxTransformer2DModel": _linked(B("transformer_blocks", P1), B("single_transformer_blocks", P1)),
    "GlmImageTransformer2DModel": _separate(B("transformer_blocks", P0)),
    "HiDreamImageTransformer2DModel": _separate(B("double_stream_blocks", P0), B("single_stream_blocks", P3)),
    "HunyuanDiT2DModel": _separate(B("blocks", P2)),
    "HunyuanImageTransformer2DModel": _linked(B("transformer_blocks", P0), B("single_transformer_blocks", P0)),
    "Ideogram4Transformer2DModel": _separate(B("layers", P3)),
    "JoyImageEditPlusTransformer3DModel": _separate(B("double_blocks", P0)),
    "JoyImageEditTransformer3DModel": _separate(B("double_blocks", P0)),
    "Krea2Transformer2DModel": _separate(B("transformer_blocks", P3)),
    "LongCatImageTransformer2DModel": _linked(B("transformer_blocks", P1), B("single_transformer_blocks", P1)),
    "Lumina2Transformer2DModel": _separate(B("layers", P3)),
    "LuminaNextDiT2DModel": _separate(B("layers", P2)),
    "NucleusMoEImageTransformer2DModel": _separate(B("transformer_blocks", P2)),
    "OmniGenTransformer2DModel": _separate(B("layers", P3)),
    "OvisImageTransformer2DModel": _linked(B("transformer_blocks", P1), B("single_transformer_blocks", P1)),
    "PRXTransformer2DModel": _separate(B("blocks", P2)),
    "PixArtTransformer2DModel": _separate(B("transformer_blocks", P2)),
    "PriorTransformer": _separate(B("transformer_blocks", P3)),
    "QwenImage21Transformer2DModel": _separate(B("transformer_blocks", P3)),
    "QwenImageTransformer2DModel": _separate(B("transformer_blocks", P1)),
    "SD3Transformer2DModel": _separate(B("transformer_blocks", P1)),
    "SanaTransformer2DModel": _separate(B("transformer_blocks", P2)),
    "UVit2DModel": _separate(B("transformer_layers", P2)),
    "ZImageTransformer2DModel": _separate(B("layers", P3, hidden="x")),
}

VIDEO = {
    "AllegroTransformer3DModel": _separate(B("transformer_blocks", P2)),
    "AnyFlowTransformer3DModel": _separate(B("blocks", P2)),
    "ChronoEditTransformer3DModel": _separate(B("blocks", P2)),
    "CogVideoXTransformer3DModel": _separate(B("transformer_blocks", P0)),
    "ConsisIDTransformer3DModel": _separate(B("transformer_blocks", P0)),
    "Cosmos3OmniTransformer": _separate(B("layers", P1, hidden="gen_seq", encoder="und_seq")),
    "CosmosTransformer3DModel": _separate(B("transformer_blocks", P2)),
    "EasyAnimateTransformer3DModel": _separate(B("transformer_blocks", P0)),
    "HeliosTransformer3DModel": _separate(B("blocks", P2)),
    "HunyuanVideo15Transformer3DModel": _separate(B("transformer_blocks", P0)),
    "HunyuanVideoFramepackTransformer3DModel": _linked(B("transformer_blocks", P0), B("single_transformer_blocks", P0)),
    "HunyuanVideoTransformer3DModel": _linked(B("transformer_blocks", P0), B("single_transformer_blocks", P0)),
    "Kandinsky5Transformer3DModel": _separate(
        B("visual_transformer_blocks", P2, hidden="visual_embed", encoder="text_embed")
    ),
    "Kandinsky6SRTransformer3DModel": _separate(B("visual_transformer_blocks", P3)),
    "Kandinsky6Transformer3DModel": _separate(B("visual_transformer_blocks", P0, hidden="vis", encoder="aud")),
    "LatteTransformer3DModel": _separate(B("transformer_blocks", P2))._replace(patch=LattePatch),
    "LTX2VideoTransformer3DModel": _separate(B("transformer_blocks", P0, encoder="audio_hidden_states")),
    "LTXVideoTransformer3DModel": _separate(B("transformer_blocks", P2)),
    "MiniMaxH3Transformer3DModel": _separate(B("transformer_blocks", P3)),
    "MochiTransformer3DModel": _separate(B("transformer_blocks", P0)),
    "MotifVideoTransformer3DModel": _separate(B("transformer_blocks", P0)),
    "SanaVideoTransformer3DModel": _separate(B("transformer_blocks", P2)),
    "SanaWMTransformer3DModel": _separate(B("blocks", P2, hidden="x", encoder="y")),
    "SkyReelsV2Transformer3DModel": _separate(B("blocks", P2)),
    "WanAnimateTransformer3DModel": _separate(B("blocks", P2)),
    "WanTransformer3DModel": _separate(B("blocks", P2)),
    "WanVACETransformer3DModel": _separate(B("blocks", P2)),
}

AUDIO = {
    "AceStepTransformer1DModel": _separate(B("layers", P2)),
    "LongCatAudioDiTTransformer": _separate(B("blocks", P3)),
    "MiniMaxMusic3Transformer1DModel": _separate(B("transformer_blocks", P3)),
    "StableAudio3DiTModel": _separate(B("transformer_blocks", P3)),
    "StableAudioDiTModel": _separate(B("transformer_blocks", P2)),
}

MODELS: dict[str, ModelEntry] = {**IMAGE, **VIDEO, **AUDIO}

# Classes of other libraries that derive from one of diffusers', but call their blocks otherwise.
DERIVED: dict[str, ModelEntry] = {
    # Nunchaku's single blocks take both streams as one, which the model joins before.
    "NunchakuFluxTransformer2DModelV2": _separate(B("transformer_blocks", P1), B("single_transformer_blocks", P3)),
}

# Transformers of diffusers, and of libraries that derive from them, that have no row, and why.
_PART = "is a part of a UNet, not a denoiser by itself"
UNCOVERED: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": "its pipeline has no progress_bar, and runs it to fill caches as well",
    "DreamLiteTransformer2DModel": _PART,
    "MiniMaxMusic3RVQDepthDecoder": "is an autoregressive decoder",
    "NunchakuFluxTransformer2dModel": "it runs all its blocks in one call; NunchakuFluxTransformer2DModelV2 has a row",
    "RFD4ProteinaTransformer": "it runs its list several times per forward, and updates pairs of tokens in between",
    "SanaWMLTX2RefinerTransformer3DModel": "its pipeline counts blocks of frames, not steps",
    "T5FilmDecoder": "its pipeline is deprecated",
    "Transformer2DModel": _PART,
    "TransformerTemporalModel": _PART,
    "UniDiffuserModel": "its pipeline is deprecated, and its blocks have skip connections",
    "WanAnimate2Transformer3DModel": "it also reads the reference by its forward, to fill key-value caches",
}


def find_entry(transformer: nn.Module) -> ModelEntry | None:
    """Return the entry of a transformer's class, or of the nearest base class that has one or a reason against it."""
    for cls in type(transformer).__mro__:
        if cls.__name__ in UNCOVERED:
            return None
        entry = MODELS.get(cls.__name__) or DERIVED.get(cls.__name__)
        if entry is not None:
            return entry
    return None
