"""The text code: one code per scene."""

import random

import torch

from cachedit.embedded.scene import sample_scene
from cachedit.embedded.text import POOLED_DIM, TOKEN_DIM, TOKENS, encode_scenes, text_ids


def test_shapes_and_values():
    scenes = [sample_scene(random.Random(seed)) for seed in range(30)]
    tokens, pooled = encode_scenes(scenes)
    assert tokens.shape == (30, TOKENS, TOKEN_DIM) and pooled.shape == (30, POOLED_DIM)
    assert tokens.dtype == pooled.dtype == torch.float32
    assert set(tokens.unique().tolist()) == set(pooled.unique().tolist()) == {0.0, 1.0}
    assert text_ids().shape == (TOKENS, 3) and len(text_ids()[:, 0].unique()) == TOKENS


def test_different_scenes_have_different_codes():
    rng = random.Random(0)
    scenes = list(dict.fromkeys(sample_scene(rng, "any") for _ in range(300)))
    tokens, pooled = encode_scenes(scenes)
    assert len(torch.unique(tokens.flatten(1), dim=0)) == len(scenes)
    assert len(torch.unique(pooled, dim=0)) == len(scenes)
