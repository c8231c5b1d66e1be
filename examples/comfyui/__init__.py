"""cachedit in ComfyUI: nodes that put a cache on a model, take it off, and tell what it did (docs/comfyui.md).

Copy this folder to ComfyUI/custom_nodes/cachedit. Patchers share one model, so the cache is put on it when a sampling
begins, and taken off when it ends; all that a node changes is the clone of the patcher that it returns.
"""

from __future__ import annotations

from typing import Any

from comfy.patcher_extension import WrappersMP

import cachedit
from cachedit import CacheStats, DBCacheConfig, TaylorSeerCalibratorConfig
from cachedit.stats import format_table

KEY = "cachedit"
BRANCHES = {0: "cond", 1: "uncond"}  # as ComfyUI numbers them
MASKS = ["none", "slow", "medium", "fast", "ultra"]


class Run:
    """Settings on a patcher, and what the cache did with them the last time."""

    def __init__(self, config: DBCacheConfig, calibrator_config: TaylorSeerCalibratorConfig | None):
        self.config, self.calibrator_config = config, calibrator_config
        self.model: Any = None
        self.steps: int | None = None
        self.branches: dict[Any, str] = {}
        self.report = "nothing has been sampled yet"

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a whole sampling: ``outer_sample(noise, latent_image, sampler, sigmas, ...)``."""
        sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
        # Without a mask nothing needs the number, and samplers may call the model more than once per step.
        self.steps = len(sigmas) - 1 if self.config.steps_computation_mask else None
        self.model = executor.class_obj.model_patcher.get_model_object("diffusion_model")
        self.branches = {}
        cachedit.enable_cache(self.model, self.config, self.calibrator_config)
        try:
            samples = executor(*args, **kwargs)
            self.report = format_table(self._stats())
        finally:
            cachedit.disable_cache(self.model)
            self.model = None
        return samples

    def call(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a call: ``apply_model(x, t, c_concat, c_crossattn, control, transformer_options, ...)``."""
        options = kwargs["transformer_options"] if "transformer_options" in kwargs else args[5]
        branches = options["cond_or_uncond"]  # that are in this batch
        key = tuple(options.get("uuids", branches))  # there may be several of a kind
        self.branches[key] = "+".join(BRANCHES.get(branch, str(branch)) for branch in branches)
        with cachedit.request(self.model, key, self.steps):
            return executor(*args, **kwargs)

    def _stats(self) -> list[CacheStats]:
        found = []
        for key, name in self.branches.items():
            with cachedit.request(self.model, key):
                for entry in cachedit.summary(self.model, logging=False):
                    entry.branches = dict.fromkeys([name], next(iter(entry.branches.values())))
                    found.append(entry)
        return found


class CacheditEnable:
    """Puts the cache on a model, in place of one that is there."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "enable", "model_patches/cachedit"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "threshold": ("FLOAT", {"default": 0.12, "min": 0.0, "max": 2.0, "step": 0.01}),
                "first_blocks": ("INT", {"default": 1, "min": 1, "max": 64}),
                "warmup_steps": ("INT", {"default": 4, "min": 0, "max": 100}),
                "max_in_a_row": ("INT", {"default": 3, "min": -1, "max": 100}),
                "taylorseer_order": ("INT", {"default": 1, "min": 0, "max": 4}),
                "mask": (MASKS,),
            }
        }

    def enable(
        self,
        model: Any,
        threshold: float,
        first_blocks: int,
        warmup_steps: int,
        max_in_a_row: int,
        taylorseer_order: int,
        mask: str,
    ) -> tuple[Any]:
        config = DBCacheConfig(
            Fn_compute_blocks=first_blocks,
            residual_diff_threshold=threshold,
            max_warmup_steps=warmup_steps,
            max_continuous_cached_steps=max_in_a_row,
            steps_computation_mask=None if mask == "none" else mask,
        )
        forecasts = TaylorSeerCalibratorConfig(taylorseer_order=taylorseer_order) if taylorseer_order else None
        (model,) = CacheditDisable().disable(model)
        run = Run(config, forecasts)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, run.sample)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, run.call)
        model.set_attachments(KEY, run)
        return (model,)


class CacheditDisable:
    """Takes the cache off a model."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "disable", "model_patches/cachedit"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def disable(self, model: Any) -> tuple[Any]:
        model = model.clone()
        for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL):
            model.remove_wrappers_with_key(kind, KEY)
        model.remove_attachments(KEY)
        return (model,)


class CacheditStats:
    """Tells what the cache on a model did in the sampling that made ``samples``."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = ("STRING",), "read", "model_patches/cachedit", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "samples": ("LATENT",)}}

    def read(self, model: Any, samples: Any) -> dict[str, Any]:
        run = model.get_attachment(KEY)
        report = "there is no cache on this model" if run is None else run.report
        return {"ui": {"text": [report]}, "result": (report,)}


NODE_CLASS_MAPPINGS = {
    "CacheditEnable": CacheditEnable,
    "CacheditDisable": CacheditDisable,
    "CacheditStats": CacheditStats,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "CacheditEnable": "Cache blocks (cachedit)",
    "CacheditDisable": "Remove block cache (cachedit)",
    "CacheditStats": "Block cache statistics (cachedit)",
}
