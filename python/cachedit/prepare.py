"""What ``enable_cache`` checks before it changes anything: on every rank, if there are several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from .adapter import TransformerPlan
from .controller import Controller
from .lazy import LazyController
from .modifier import ParamsModifier, Settings, modifiers_per_transformer, settings_per_section
from .parallel import ParallelismConfig
from .quantization import Quantization
from .targets import plans_of

if TYPE_CHECKING:
    from .parallel.apply import Parallelism

__all__ = ["Prepared", "agree_on", "prepare_caches"]


class Prepared(NamedTuple):
    """What ``enable_cache`` has checked, and is to enable."""

    pipe: Any
    controllers: list[Controller]
    transformers: list[nn.Module]
    quantization: Quantization | None = None

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same on ranks that decide alike."""
        cache = [str(settings) for controller in self.controllers for settings in controller.settings]
        return {"cache": cache} | (self.quantization.fingerprint() if self.quantization else {})


def prepare_caches(target: Any, common: Settings, params_modifiers: Any) -> Prepared:
    """Make the controllers of a target, which changes nothing; raises where a configuration does not fit."""
    pipe, plans = plans_of(target)
    common.check()
    if params_modifiers is None:
        params_modifiers = [plan.modifiers for plan in plans]
    counts = [len(plan.modifiers) for plan in plans]
    controllers = [
        _make_controller(plan, common, modifiers)
        for plan, modifiers in zip(plans, modifiers_per_transformer(params_modifiers, counts), strict=True)
    ]
    return Prepared(pipe, controllers, [plan.transformer for plan in plans])


def agree_on(target: Any, config: ParallelismConfig, prepare: Callable[[], Prepared]) -> tuple[Prepared, Parallelism]:
    """Prepare on every rank, or raise on every rank."""
    from .parallel.apply import prepare_parallelism, process_group  # they import DTensor, which takes half a second
    from .parallel.groups import agree

    group = process_group(config)

    def check() -> tuple[Prepared, Parallelism]:
        prepared = prepare()
        if prepared.quantization is not None and config.tp_enabled():
            raise ValueError("quantize_config cannot be combined with tp_size: quantized weights are not cut")
        for controller in prepared.controllers:
            if config.cp_enabled() and controller.tap is not None and controller.tap.sea is not None:
                raise ValueError('metric must be "l1" under sequence parallelism: the filter of "sea" needs all tokens')
        pipe = prepared.pipe if prepared.pipe is not None else getattr(target, "pipe", target)
        return prepared, prepare_parallelism(prepared.transformers, pipe, config, group)

    return agree(group, check, lambda both: both[0].fingerprint() | both[1].fingerprint())


def _make_controller(plan: TransformerPlan, common: Settings, modifiers: Sequence[ParamsModifier | None]) -> Controller:
    if plan.search is not None:  # lists are not known yet: one modifier stands for all of them
        _, (settings,) = settings_per_section(common, modifiers, [[None]])
        settings.check()
        return LazyController(plan, settings)
    groups, per_section = settings_per_section(common, modifiers, plan.sections)
    for settings in per_section:
        settings.check()
    return Controller(plan._replace(sections=groups), per_section)
