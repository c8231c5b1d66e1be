"""How much memory a request's stored residuals will take, found out without computing the model's blocks."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .blocks import Section, run_sections
from .body import SectionRun
from .calibrator import CalibratorConfig
from .config import BasicCacheConfig, DBCacheConfig, DBPruneConfig
from .context import StreamSpec
from .controller import Controller
from .metric import Measured
from .modifier import Settings, modifiers_per_transformer, settings_per_section
from .policy import Decision
from .prune import SAMPLED
from .request import Branch
from .store import ResidualStore
from .targets import controllers_of, plans_of
from .teacache import TeaCacheConfig

__all__ = ["MemoryEstimate", "estimate_memory"]


class Held(NamedTuple):
    """What one section will hold for one guidance branch."""

    transformer: str
    blocks: str
    branch: str
    bytes: int


@dataclass(frozen=True)
class MemoryEstimate:
    """What one request will hold, by transformer, section and guidance branch."""

    rows: tuple[Held, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all buffers of one request."""
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{row.transformer}.{row.blocks}, {row.branch}: {row.bytes / 1e6:.1f} MB" for row in self.rows]
        return "\n".join([*lines, f"one request: {self.bytes / 1e6:.1f} MB"])


def estimate_memory(
    pipe_or_adapter: Any,
    cache_config: BasicCacheConfig | None = None,
    height: int | None = None,
    width: int | None = None,
    calibrator_config: CalibratorConfig | None = None,
    params_modifiers: Any = None,
    **inputs: Any,
) -> MemoryEstimate:
    """Say how much memory the residuals of one request will take.

    The pipeline is run for two steps in which only the first block of each section is computed, and no picture is
    decoded. A transformer is called once, with ``inputs``. A cache that is enabled stays enabled and starts afresh.

    Args:
        pipe_or_adapter: What ``enable_cache`` would be given.
        cache_config: As for ``enable_cache``.
        height: Height of the picture in pixels. Default: the pipeline's.
        width: Width of the picture in pixels. Default: the pipeline's.
        calibrator_config: As for ``enable_cache``.
        params_modifiers: As for ``enable_cache``.
        **inputs: Further arguments of the call, such as ``prompt``, ``num_frames`` or ``guidance_scale``. The prompt is
            empty by default.

    Returns:
        The bytes of all buffers, in all and by section and branch.

    Raises:
        ValueError, TypeError: As ``enable_cache``, and as the call itself.

    Example:
        >>> estimate = cachedit.estimate_memory(pipe, DBCacheConfig(), 1024, 1024, TaylorSeerCalibratorConfig())
        >>> estimate.bytes
    """
    pipe, plans = plans_of(pipe_or_adapter)
    unknown = [type(plan.transformer).__name__ for plan in plans if plan.search is not None]
    if unknown:
        raise ValueError(f"pipe_or_adapter: the blocks of {unknown[0]} are not known; describe them with BlockAdapter")
    common = Settings(DBCacheConfig() if cache_config is None else cache_config, calibrator_config)
    common.check()
    counts = [len(plan.modifiers) for plan in plans]
    probes = []
    for plan, modifiers in zip(plans, modifiers_per_transformer(params_modifiers, counts), strict=True):
        groups, settings = settings_per_section(common, modifiers, plan.sections)
        probes.append(_Probe(plan._replace(sections=groups), settings))
    before = controllers_of(pipe_or_adapter)
    for probe in probes:
        probe.attach()
    try:
        with torch.no_grad():
            _run(pipe, plans[0].transformer, {"height": height, "width": width} | inputs)
    finally:
        for probe in probes:
            probe.detach()
        for controller in before:
            controller.attach()
    return MemoryEstimate(tuple(row for probe in probes for row in probe.held()))


def _run(pipe: Any, transformer: nn.Module, inputs: dict[str, Any]) -> None:
    inputs = {name: value for name, value in inputs.items() if value is not None}
    if pipe is None:
        transformer(**inputs)
        return
    known = inspect.signature(pipe.__call__).parameters
    defaults: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    if not any("prompt" in name for name in inputs):
        defaults["prompt"] = ""
    pipe(**{name: value for name, value in defaults.items() if name in known} | inputs)


class _Probe(Controller):
    """A controller whose forwards compute one block per section and note what the body would get."""

    def __init__(self, plan: Any, settings: list[Settings]):
        super().__init__(plan, settings)
        self.wanted = settings
        self.calls = 0
        self.seen: dict[tuple[str, int], list[StreamSpec]] = {}  # streams, and the signal that was measured last
        for section in self.sections:
            section.configure(replace(DBCacheConfig(), Fn_compute_blocks=1), None)
            section.in_place = False

    def forward(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        branch = self.branch_name(self.calls)
        states = [_Recorder(self.seen, (branch, index)) for index in range(len(self.sections))]
        runs = [SectionRun(section, state) for section, state in zip(self.sections, states, strict=True)]  # type: ignore[arg-type]
        with run_sections(self, runs, Branch(branch, [], None), args, kwargs):
            output = original(*args, **kwargs)
        self.calls += 1
        return output

    def held(self) -> list[Held]:
        """What was seen, as bytes under the wanted settings."""
        name = type(self.transformer).__name__
        return [
            Held(name, self.sections[index].name, branch, _bytes(self.wanted[index], self.sections[index], specs))
            for (branch, index), specs in self.seen.items()
        ]


class _Recorder:
    """Stands in for a section's state: every step is reused, by passing the streams on."""

    def __init__(self, seen: dict[tuple[str, int], list[StreamSpec]], key: tuple[str, int]):
        self.seen = seen
        self.key = key

    def decide(self, seen: Measured, streams: list[torch.Tensor]) -> tuple[Decision, float | None]:
        measured = seen.after if seen.signal is None else seen.signal
        self.seen[self.key] = [StreamSpec.of(tensor) for tensor in (*streams, measured)]
        return Decision.REUSE, None

    def forecast(self, streams: list[torch.Tensor], diff: float | None) -> list[torch.Tensor]:
        return streams

    def skip_storing(self, diff: float | None = None) -> None:
        """The section has no body."""


def _bytes(settings: Settings, section: Section, specs: list[StreamSpec]) -> int:
    config, calibrator = settings
    *streams, signal = specs
    residuals = ResidualStore(calibrator).slots * sum(_residual_bytes(spec, config.residual_float8) for spec in streams)
    measured = _nbytes(signal) if _measures(config) else 0
    if not isinstance(config, DBPruneConfig):
        return residuals + measured
    if config.force_reduce_calibrator_vram and calibrator is not None and len(specs[0].shape) > 1:
        tokens = specs[0].shape[1]
        measured = measured // tokens * -(-tokens // SAMPLED)
    return len(config.prunable_blocks(section.total)) * (residuals + measured)


def _nbytes(spec: StreamSpec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _residual_bytes(spec: StreamSpec, float8: bool) -> int:
    scale = torch.float32.itemsize
    return math.prod(spec.shape[:-1]) * (spec.shape[-1] + scale) if float8 else _nbytes(spec)


def _measures(config: BasicCacheConfig) -> bool:
    if isinstance(config, TeaCacheConfig):
        config = replace(config, coefficients=(0.0,))  # which ones makes no difference
    steps = 28 if isinstance(config.steps_computation_mask, str) else None  # any number that named masks have
    return config.make_policy(steps).measures
