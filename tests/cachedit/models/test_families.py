"""What the model table says, proved on a small pipeline of every family: see tests/helpers/pipelines/."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import cachedit
from cachedit import DBCacheConfig, TaylorSeerCalibratorConfig
from cachedit.adapter import plan_for
from cachedit.models import find_transformers
from executor import executing
from pipelines import BUILDERS, LOOPS, Tiny, build

STEPS, OTHER_STEPS = 8, 12


class Family(NamedTuple):
    name: str
    tiny: Tiny
    transformers: list[torch.nn.Module]
    baseline: torch.Tensor
    state_names: list[list[str]]


@pytest.fixture(scope="module", params=[*BUILDERS, *LOOPS])
def family(request):
    return make_family(request.param)


def make_family(name: str) -> Family:
    tiny = build(name)
    transformers = find_transformers(tiny.pipe)
    names = [list(transformer.state_dict()) for transformer in transformers]
    return Family(name, tiny, transformers, tiny(STEPS), names)


@pytest.fixture(autouse=True)
def disabled_afterwards(family):
    yield
    cachedit.disable_cache(family.tiny.pipe)
    for transformer in family.transformers:
        cachedit.disable_cache(transformer)


def enable(target, mask="fast", **kwargs: Any):
    config = DBCacheConfig(
        Fn_compute_blocks=1,
        max_warmup_steps=0,
        steps_computation_mask=mask,
        steps_computation_policy="static",
        **kwargs,
    )
    return cachedit.enable_cache(target, config, TaylorSeerCalibratorConfig())


def mask_of(family: Family, steps: int) -> list[int]:
    return cachedit.steps_mask(total_steps=family.tiny.forwards(steps), mask_policy="fast")


def mask_for(family: Family, steps: int) -> list[int] | str:
    """By name where the pipeline tells the step count; transformers that share the steps get one mask each."""
    return "fast" if len(family.transformers) == 1 else mask_of(family, steps)


class Calls:
    """What a transformer was called with, and what it returned."""

    def __init__(self, transformer: torch.nn.Module, stack: ExitStack):
        self.calls: list[tuple[Any, Any, Any]] = []
        stack.callback(transformer.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        stack.callback(transformer.register_forward_hook(self._after).remove)

    def _before(self, module, args, kwargs):
        self.given = copies(args), copies(kwargs)

    def _after(self, module, args, output):
        self.calls.append((*self.given, copies(output)))


def copies(tree: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.clone, tree)


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def expected(family: Family, steps: int, **kwargs: Any) -> torch.Tensor:
    plans = [plan_for(transformer) for transformer in family.transformers]
    sections = {plan.transformer: plan.sections for plan in plans}
    with ExitStack() as stack:
        for plan in plans:
            if plan.patch_functor is not None:
                stack.enter_context(plan.patch_functor.applied(plan.transformer))
        stack.enter_context(executing(sections, mask_of(family, steps), family.tiny.branches))
        return family.tiny(steps, **kwargs)


def test_nothing_reusable_is_the_baseline(family):
    cachedit.enable_cache(family.tiny.pipe, DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0.0))
    assert torch.equal(family.tiny(STEPS), family.baseline)
    assert [list(transformer.state_dict()) for transformer in family.transformers] == family.state_names
    cachedit.disable_cache(family.tiny.pipe)
    assert torch.equal(family.tiny(STEPS), family.baseline)
    assert [list(transformer.state_dict()) for transformer in family.transformers] == family.state_names


def test_mask_equals_an_independent_executor(family):
    """At two resolutions and step counts in a row, and the first one again; the summary reports the mask."""
    theirs = expected(family, STEPS), expected(family, OTHER_STEPS, size=1)
    enable(family.tiny.pipe, mask_for(family, STEPS))
    ours = family.tiny(STEPS)
    assert_close(ours, theirs[0])
    assert not torch.allclose(ours, family.baseline, rtol=1e-3)  # else the mask has shown nothing
    check_summary(family, STEPS)
    if len(family.transformers) > 1:
        enable(family.tiny.pipe, mask_for(family, OTHER_STEPS))
    assert_close(family.tiny(OTHER_STEPS, size=1), theirs[1])
    check_summary(family, OTHER_STEPS)
    if len(family.transformers) > 1:
        enable(family.tiny.pipe, mask_for(family, STEPS))
    assert torch.equal(family.tiny(STEPS), ours)


def check_summary(family: Family, steps: int) -> None:
    mask = mask_of(family, steps)
    for stats in cachedit.summary(family.tiny.pipe, logging=False):
        assert len(stats.branches) == family.tiny.branches
        for branch in stats.branches.values():
            count = len(branch.records)
            assert [int(not record.reused) for record in branch.records] == mask[:count]
            assert count == len(mask) or len(family.transformers) > 1
    assert cachedit.summary(family.tiny.pipe, logging=False)[0].cached_steps


def test_guidance_branches_are_kept_apart(family):
    """Each branch of a guided run is what the transformer gives when it runs that branch alone, without a pipeline."""
    if "PAG" in family.name or "KV" in family.name:
        pytest.skip("its attention processors or key-value cache are there only while the pipeline runs")
    enable(family.tiny.pipe, mask_for(family, STEPS))
    with ExitStack() as stack:
        recorded = {transformer: Calls(transformer, stack) for transformer in family.transformers}
        family.tiny(STEPS)
    cachedit.disable_cache(family.tiny.pipe)
    mask = mask_of(family, STEPS)
    for transformer, record in recorded.items():
        for branch in range(family.tiny.branches):
            calls = record.calls[branch :: family.tiny.branches]
            steps = min(len(calls), len(mask))  # fewer with a second transformer, more with several loops
            enable(transformer, mask[:steps], num_inference_steps=steps)
            for args, kwargs, output in calls:
                with torch.no_grad():
                    torch.testing.assert_close(tensors(transformer(*args, **kwargs)), tensors(output), rtol=0, atol=0)
