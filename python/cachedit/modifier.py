"""ParamsModifier: other settings for single block lists or transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from .calibrator import CalibratorConfig
from .config import BasicCacheConfig, CacheType, DBCacheConfig

__all__ = ["ParamsModifier", "Settings", "modified", "modifiers_per_transformer", "settings_per_section"]


class Settings(NamedTuple):
    """Configurations of one section."""

    config: BasicCacheConfig
    calibrator_config: CalibratorConfig | None

    def check(self) -> None:
        """Check types and ranges.

        Raises:
            TypeError, ValueError: Naming the field, what was expected and what came.
        """
        config, calibrator = self
        _check_config(config)
        if calibrator is not None and not isinstance(calibrator, CalibratorConfig):
            raise TypeError(f"calibrator_config must be a CalibratorConfig, got {type(calibrator).__name__}")
        config.validate()
        if calibrator is not None:
            calibrator.validate()


class ParamsModifier:
    """Settings for one block list (or one transformer) that differ from those given to ``enable_cache``.

    Args:
        cache_config: Fields that are not None replace those of the common configuration; a partial one is made by
            ``DBCacheConfig().reset(max_warmup_steps=4)``. One of another class (``DBPruneConfig``) replaces it whole.
        calibrator_config: Replaces the common one.
        **fields: Single fields of the cache configuration, as in ``ParamsModifier(max_warmup_steps=4)``.

    Raises:
        TypeError: For something else than configurations, or a name that is not a field.
    """

    def __init__(
        self,
        cache_config: BasicCacheConfig | None = None,
        calibrator_config: CalibratorConfig | None = None,
        **fields: Any,
    ):
        for name, value, kind in (
            ("cache_config", cache_config, BasicCacheConfig),
            ("calibrator_config", calibrator_config, CalibratorConfig),
        ):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
        if fields:
            base = DBCacheConfig().reset() if cache_config is None else copy.deepcopy(cache_config)
            cache_config = base.update(**fields)
        self.cache_config = cache_config
        self.calibrator_config = calibrator_config

    def apply(self, settings: Settings) -> Settings:
        """Return changed copies of the settings; they are not validated."""
        return modified(settings, self.cache_config, self.calibrator_config)

    def __repr__(self) -> str:
        return f"ParamsModifier(cache_config={self.cache_config!r}, calibrator_config={self.calibrator_config!r})"


def modified(
    settings: Settings, cache_config: BasicCacheConfig | None, calibrator_config: CalibratorConfig | None
) -> Settings:
    """Return copies of ``settings`` with what is given put in; fields that are None keep what is set."""
    config = copy.deepcopy(settings.config)
    if cache_config is not None:
        _check_config(cache_config)
        # A partial configuration of fields that all kinds have says nothing about the kind.
        partial = _kind(cache_config) is DBCacheConfig and cache_config.cache_type is None
        if _kind(cache_config) is not _kind(config) and not partial:
            config = type(cache_config)(num_inference_steps=config.num_inference_steps)
        config.update(**copy.deepcopy(vars(cache_config)))
    calibrator = settings.calibrator_config if calibrator_config is None else calibrator_config
    return Settings(config, copy.deepcopy(calibrator))


def modifiers_per_transformer(modifiers: Any, counts: Sequence[int]) -> list[list[ParamsModifier | None]]:
    """Unfold what users give: one, one per block list, one per transformer, or one per block list per transformer.

    Args:
        modifiers: A modifier, None, or a list (of lists) of these.
        counts: Number of block lists per transformer.

    Returns:
        Per transformer one entry per block list.

    Raises:
        TypeError, ValueError: For something else than modifiers, or another number of them.
    """
    if isinstance(modifiers, (list, tuple)):
        per_list = len(counts) == 1 and not any(isinstance(entry, (list, tuple)) for entry in modifiers)
        entries = [modifiers] if per_list else list(modifiers)
    else:
        entries = [modifiers] * len(counts)
    if len(entries) != len(counts):
        raise ValueError(f"params_modifiers: expected one entry per transformer ({len(counts)}), got {len(entries)}")
    unfolded = []
    for entry, count in zip(entries, counts, strict=True):
        flat = list(entry) if isinstance(entry, (list, tuple)) else [entry]
        flat = flat * count if len(flat) == 1 else flat
        if len(flat) != count:
            raise ValueError(f"params_modifiers: expected one, or one per block list ({count}), got {len(flat)}")
        for modifier in flat:
            if modifier is not None and not isinstance(modifier, ParamsModifier):
                raise TypeError(f"params_modifiers must hold ParamsModifier objects, got {type(modifier).__name__}")
        unfolded.append(flat)
    return unfolded


def settings_per_section(
    common: Settings, modifiers: Sequence[ParamsModifier | None], sections: Sequence[Sequence[Any]]
) -> tuple[list[list[Any]], list[Settings]]:
    """Return the sections with their settings; lists of a section that get different ones decide separately.

    Args:
        common: Settings without modifiers.
        modifiers: One per block list, through all sections.
        sections: Groups of block lists that share a decision.
    """
    groups: list[list[Any]] = []
    settings: list[Settings] = []
    modifier = iter(modifiers)
    disabled = common.config.cache_type is CacheType.NONE
    for group in sections:
        applied = [common if (m := next(modifier)) is None else m.apply(common) for _ in group]
        if any(each.config.cache_type is CacheType.NONE for each in applied) and not disabled:
            raise ValueError("params_modifiers: cache_type NONE is for all block lists, as enable_cache's cache_config")
        split = any(each != applied[0] for each in applied)
        groups += [[item] for item in group] if split else [list(group)]
        settings += applied if split else applied[:1]
    return groups, [Settings(copy.deepcopy(s.config), copy.deepcopy(s.calibrator_config)) for s in settings]


def _check_config(config: Any) -> None:
    if not isinstance(config, BasicCacheConfig):
        raise TypeError(f"cache_config must be a DBCacheConfig, got {type(config).__name__}")


def _kind(config: BasicCacheConfig) -> type[BasicCacheConfig]:
    return DBCacheConfig if type(config) is BasicCacheConfig else type(config)
