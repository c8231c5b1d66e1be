"""Stand-ins for vLLM-Omni's transformers: its blocks' parameters, the way they are called, and what they return.

All else is small. Facts are from vllm-project/vllm-omni at d624074, except for those of Magi2, at 15d422a.
"""

import inspect
from typing import NamedTuple

import torch
from torch import nn

DIM = 8


class BlockList(NamedTuple):
    """A block list: its blocks' parameters, the arguments of a call, and the order of what comes back.

    Arguments are ``h`` and ``e`` (both streams), ``t`` (the time) and ``x`` (what plays no part, or is passed through).
    """

    parameters: str
    given: str
    returns: str


FLUX = BlockList(
    "hidden_states encoder_hidden_states temb image_rotary_emb joint_attention_kwargs",
    "hidden_states=h encoder_hidden_states=e temb=t image_rotary_emb=x joint_attention_kwargs=x",
    "eh",
)
LUMINA = BlockList("hidden_states attention_mask image_rotary_emb temb", "h x x t", "h")

MODELS: dict[str, dict[str, BlockList]] = {
    "BooguImageTransformer2DModel": {
        "double_stream_layers": BlockList(
            "img_hidden_states instruct_hidden_states img_attention_mask joint_attention_mask img_rotary rotary temb",
            "h e x x x x t",
            "he",
        ),
        "single_stream_layers": LUMINA,
    },
    "Cosmos3VFMTransformer": {
        "gen_layers": BlockList("hidden_states k_und v_und freqs_cos freqs_sin", "h k_und=t v_und=x", "h")
    },
    "FusionModel": {
        "fused_blocks": BlockList("hidden_states encoder_hidden_states attn vid_e audio_e", "h e x vid_e=t", "he")
    },
    "ErnieImageTransformer2DModel": {
        "layers": BlockList("hidden_states rotary_pos_emb temb attention_mask", "h x t x", "h")
    },
    "FluxTransformer2DModel": {"transformer_blocks": FLUX, "single_transformer_blocks": FLUX},
    "Flux2Transformer2DModel": {
        "transformer_blocks": BlockList(
            "hidden_states encoder_hidden_states temb_mod_params_img temb_mod_params_txt image_rotary_emb",
            "hidden_states=h encoder_hidden_states=e temb_mod_params_img=t temb_mod_params_txt=t image_rotary_emb=x",
            "eh",
        ),
        "single_transformer_blocks": BlockList(
            "hidden_states encoder_hidden_states temb_mod_params image_rotary_emb text_seq_len",
            "hidden_states=h encoder_hidden_states=x temb_mod_params=t image_rotary_emb=x text_seq_len=x",
            "h",
        ),
    },
    "GlmImageTransformer2DModel": {
        "transformer_blocks": BlockList(
            "hidden_states encoder_hidden_states temb image_rotary_emb attention_mask attention_kwargs kv_cache",
            "h e t x x x kv_cache=x",
            "he",
        )
    },
    "HeliosTransformer3DModel": {
        "blocks": BlockList("hidden_states encoder_hidden_states temb rotary_emb length", "h e t x x", "h")
    },
    "HunyuanImage3Model": {
        "layers": BlockList(
            "hidden_states attention_mask position_ids past_key_value positions temb",
            "hidden_states=h past_key_value=x positions=x temb=t",
            "hx",
        )
    },
    "HunyuanVideo15Transformer3DModel": {
        "transformer_blocks": BlockList(
            "hidden_states encoder_hidden_states temb attention_mask freqs_cis hidden_states_mask",
            "h e t x x hidden_states_mask=x",
            "he",
        )
    },
    "Krea2Transformer2DModel": {
        "transformer_blocks": BlockList("hidden_states temb image_rotary_emb attention_mask", "h t x x", "h")
    },
    "LongCatImageTransformer2DModel": {"transformer_blocks": FLUX, "single_transformer_blocks": FLUX},
    "LTX2VideoTransformer3DModel": {  # the second stream is the audio
        "transformer_blocks": BlockList(
            "hidden_states audio_hidden_states encoder_hidden_states audio_encoder_hidden_states temb temb_audio",
            "h e x x temb=t temb_audio=t",
            "he",
        )
    },
    "Magi2TransformerBlock": {"layers": BlockList("hidden_states temb rope", "h t rope=x", "h")},
    "Transformer2DModel": {"layers": LUMINA},
    "QwenImageTransformer2DModel": {
        "transformer_blocks": BlockList(
            "hidden_states encoder_hidden_states encoder_hidden_states_mask temb image_rotary_emb",
            "hidden_states=h encoder_hidden_states=e encoder_hidden_states_mask=x temb=t image_rotary_emb=x",
            "eh",
        )
    },
    "SD3Transformer2DModel": {
        "transformer_blocks": BlockList(
            "hidden_states encoder_hidden_states temb", "hidden_states=h encoder_hidden_states=e temb=t", "eh"
        )
    },
    "StableAudioDiTModel": {
        "transformer_blocks": BlockList(
            "hidden_states encoder_hidden_states rotary_embedding attention_mask temb",
            "h e rotary_embedding=x attention_mask=x temb=t",
            "h",
        )
    },
    "WanS2VTransformer3DModel": {
        "blocks": BlockList(
            "hidden_states encoder_hidden_states seq_lens grid_sizes freqs context context_lens e",
            "h e=t seq_lens=x grid_sizes=x freqs=x context=x context_lens=x",
            "h",
        )
    },
    "WanTransformer3DModel": {
        "blocks": BlockList("hidden_states encoder_hidden_states temb rotary_emb hidden_states_mask", "h e t x x", "h")
    },
}


class Block(nn.Module):
    """Takes the streams where ``spec`` has them; the second parameter is one where it gets a tensor."""

    def __init__(self, spec: BlockList):
        super().__init__()
        self.returns = spec.returns
        self.image, self.text = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def run(self, arguments: inspect.BoundArguments):
        hidden, second = list(arguments.arguments.values())[:2]
        time = next(value for value in arguments.arguments.values() if isinstance(value, float))
        text = second if isinstance(second, torch.Tensor) else torch.zeros(1, 1, DIM)
        hidden = hidden + 0.1 * torch.tanh(self.image(hidden) + text.mean(1, keepdim=True)) * (1 + 0.1 * time)
        results = {"h": hidden, "e": text + 0.1 * torch.tanh(self.text(text))}
        results["x"] = arguments.arguments.get("past_key_value")
        return hidden if self.returns == "h" else tuple(results[name] for name in self.returns)


def block_class(spec: BlockList) -> type[Block]:
    """The class of a list's blocks, whose forward takes these parameters and no others."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ["self", *spec.parameters.split()]
    signature = inspect.Signature([inspect.Parameter(name, kind, default=None) for name in names])

    def forward(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs)
        arguments.apply_defaults()
        del arguments.arguments["self"]
        return self.run(arguments)

    forward.__signature__ = signature
    return type("Block", (Block,), {"forward": forward})


class Transformer(nn.Module):
    """Calls its block lists as vLLM-Omni's transformers do: a list with one stream, after one with two, gets both."""

    def __init__(self, lists: dict[str, BlockList], depth: int = 6):
        super().__init__()
        self.lists = lists
        for name, spec in lists.items():
            kind = block_class(spec)
            setattr(self, name, nn.ModuleList(kind(spec) for _ in range(depth)))

    def forward(self, hidden, encoder, time, other=None):
        streams = {"h": hidden, "e": encoder}
        for name, spec in self.lists.items():
            joins = spec.returns == "h" and len(self.lists) > 1
            if joins:
                streams["h"] = torch.cat([streams["e"], streams["h"]], 1)
            for index, block in enumerate(getattr(self, name)):
                output = self.call(block, spec, {**streams, "t": time, "x": other})
                outputs = (output,) if spec.returns == "h" else output
                found = dict(zip(spec.returns, outputs, strict=True))
                streams = {which: found.get(which, stream) for which, stream in streams.items()}
                streams["h"] = self.after_transformer_block(index, streams["h"])
            if joins:
                streams["h"] = streams["h"][:, encoder.shape[1] :]
        return streams["h"] + streams["e"].mean(1, keepdim=True)

    def call(self, block, spec, values):
        positional = [values[given] for given in spec.given.split() if "=" not in given]
        named = dict(given.split("=") for given in spec.given.split() if "=" in given)
        return block(*positional, **{name: values[given] for name, given in named.items()})

    def after_transformer_block(self, index, hidden):
        """Wan 2.2 S2V adds audio here; where VACE adds its hints."""
        return hidden


def transformer(name: str) -> Transformer:
    """A stand-in for one of :data:`MODELS`, with its class name, and always with the same weights."""
    torch.manual_seed(0)
    return type(name, (Transformer,), {"__module__": "vllm_omni.diffusion.models"})(MODELS[name]).eval()
