"""Caching a transformer that nobody has described: its block lists are learnt from its first forward."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from .adapter import TransformerPlan
from .blocks import intercept
from .config import BasicCacheConfig
from .controller import Controller
from .learn import learn_sections
from .modifier import Settings, settings_per_section
from .policy import Decision
from .tap import make_tap

__all__ = ["LazyController"]

logger = logging.getLogger(__name__)


class LazyController(Controller):
    """Computes the first forward while it watches the blocks, and caches from the second on.

    The first forward is the first step of its request, computed and not stored. Where what is seen speaks against
    caching, that forward raises, and the cache is taken off.

    Args:
        plan: The transformer, with ``search`` set and no sections.
        common: Settings of all block lists, validated and copied by the caller.

    Raises:
        ValueError: If there is no list of blocks to look at, or none that is long enough for the settings.
    """

    def __init__(self, plan: TransformerPlan, common: Settings):
        assert plan.search is not None
        self.plan = plan
        self.search = plan.search
        self.common = common
        blocks = max(len(blocks) for _, blocks in self.search.candidates(plan.transformer))
        computed = common.config.Fn_compute_blocks + common.config.Bn_compute_blocks
        if computed > blocks:
            raise ValueError(
                f"Fn_compute_blocks + Bn_compute_blocks = {computed} is more than the {blocks} blocks of the longest "
                f"list of {type(plan.transformer).__name__}"
            )
        make_tap(plan.transformer, [common])  # raises where TeaCache does not know what to measure
        super().__init__(plan, [])

    @property
    def config(self) -> BasicCacheConfig:
        return self.sections[0].config if self.sections else self.common.config

    @property
    def settings(self) -> list[Settings]:
        return super().settings if self.sections else [self.common]

    def reconfigure(self, settings: Sequence[Settings]) -> None:
        """Take on other configurations and start afresh."""
        if self.sections:
            super().reconfigure(settings)
        else:
            (self.common,) = settings

    def forward(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Learn at the first forward; the others are cached."""
        if self.sections or self.is_bypassed(args, kwargs):
            return super().forward(original, args, kwargs)
        candidates = self.search.candidates(self.transformer)
        try:
            output, groups = learn_sections(
                self.transformer, candidates, lambda: original(*args, **kwargs), self.search.blocks_policy
            )
            self._check_pattern([item.pattern.name for group in groups for item in group])
            groups, settings = settings_per_section(self.common, [None] * sum(map(len, groups)), groups)
            self._link(self.plan._replace(sections=groups), settings)
        except ValueError:
            self.detach()
            raise
        for blocks, link in self.lists:
            intercept(blocks, self, link, self.passes)
        self._set_tap(make_tap(self.transformer, settings))
        for section, group in zip(self.sections, groups, strict=True):
            patterns = ", ".join(f"{item.name} ({item.pattern.name})" for item in group)
            logger.info("learnt on %s: %s, %d blocks", type(self.transformer).__name__, patterns, section.total)
        self._record_first_step()
        return output

    def _check_pattern(self, patterns: list[str]) -> None:
        wanted = self.search.pattern
        if wanted is not None and set(patterns) != {wanted.name}:
            seen = ", ".join(patterns)
            raise ValueError(f"forward_pattern: {wanted.name} is given, but the blocks were seen to be {seen}")

    def _record_first_step(self) -> None:
        scope = self.scope
        steps = self._steps(scope)
        request, outer = self.requests.enter(scope.key, steps)
        try:
            self._listen(request, scope)
            branch = request.branch(self.branch_name(request.turn), self.sections, steps)
            for state in branch.states:
                state.policy.reason = "learning"
                state.policy.record(Decision.COMPUTE, None, stored=False)
            request.calls += 1
        finally:
            self.requests.leave(request, outer)
