"""DBPrune's part of a forward: every block decides for itself whether to be computed or to add its stored residual."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import cachedit_kernels as kernels

from .blocks import Guard, Link, Section, Site
from .config import CalibratorConfig, DBPruneConfig
from .context import State
from .metric import relative
from .pattern import check_shapes
from .policy import Decision
from .store import ResidualStore, allocate

__all__ = ["PruneRun", "PruneState"]

SAMPLED = 4  # of so many tokens one is compared, with force_reduce_calibrator_vram
LEADING = 5  # differences that the dynamic threshold follows


class _Block:
    """What is known of one block: its input when it was last computed, and its residuals."""

    __slots__ = ("previous", "residuals")

    def __init__(self, calibrator_config: CalibratorConfig | None):
        self.residuals = ResidualStore(calibrator_config)
        self.previous: torch.Tensor | None = None


class PruneState(State):
    """State of one section on one branch of a request.

    Args:
        config: Validated cache configuration.
        calibrator_config: Validated calibrator configuration, or None for plain reuse.
    """

    config: DBPruneConfig

    def __init__(self, config: DBPruneConfig, calibrator_config: CalibratorConfig | None):
        super().__init__(config, calibrator_config)
        self.blocks: dict[int, _Block] = {}
        reduced = config.force_reduce_calibrator_vram and calibrator_config is not None
        self.stride = SAMPLED if reduced else 1
        self.begin(None)

    def forget(self) -> None:
        super().forget()
        for block in self.blocks.values():
            block.residuals.forget()

    def release(self) -> None:
        super().release()
        self.blocks.clear()

    @property
    def bytes_held(self) -> int:
        inputs = sum(block.previous.nbytes for block in self.blocks.values() if block.previous is not None)
        return inputs + sum(block.residuals.bytes_held for block in self.blocks.values())

    # One step: open(), for each block prunes(), then forecast() or keep_input() and store(), then close().

    def open(self, streams: list[torch.Tensor]) -> None:
        """The first block of a step that may be pruned gets these streams: decide what concerns all blocks."""
        if self.policy.refresh_due():
            self.forget()
        self.check_streams(streams)
        self.verdict = self.policy.plan()
        self.diffs: list[float] = []
        self.pruned = 0

    def prunes(self, number: int, hidden: torch.Tensor) -> bool:
        """Decide one block by its input; waits for the device if the step leaves it to the difference."""
        block = self.blocks.get(number)
        if self.verdict is Decision.COMPUTE or block is None or not block.residuals.steps:
            return False
        if self.verdict is Decision.MEASURE:
            threshold = self._threshold()
            diff = relative(kernels.l1([block.previous], [self._sample(hidden)]))  # type: ignore[list-item]
            if not math.isfinite(diff):
                self.policy.nonfinite += 1
                return False
            self.diffs.append(diff)
            self.policy.reason = "diff"
            return diff < threshold
        return True

    def forecast(self, number: int, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        """Forecast the outputs of a pruned block from its inputs."""
        self.pruned += 1
        return self.blocks[number].residuals.forecast(self.policy.step, streams)

    def keep_input(self, number: int, hidden: torch.Tensor) -> None:
        """Keep the input of a block that is about to be computed, if differences are measured at all."""
        block = self.blocks.setdefault(number, _Block(self.calibrator_config))
        if self.policy.measures:
            sample = self._sample(hidden)
            if block.previous is None:
                block.previous = allocate(1, sample)[0]
            block.previous.copy_(sample)

    def store(self, number: int, streams: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Keep the residual of a computed block."""
        self.blocks[number].residuals.push(self.policy.step, streams, outputs)

    def close(self, blocks: int, opened: bool) -> None:
        """The step is done: take note of it."""
        if not opened:
            self.policy.record(Decision.COMPUTE, None, stored=False, blocks=blocks)
            return
        diff = statistics.fmean(self.diffs) if self.diffs else None
        decision = Decision.REUSE if self.pruned else Decision.COMPUTE
        self.policy.record(decision, diff, pruned=self.pruned, blocks=blocks)

    def _threshold(self) -> float:
        config = self.config
        base = config.residual_diff_threshold
        leading = [diff for diff in self.diffs[:LEADING] if diff > 0.0]
        if not config.enable_dynamic_prune_threshold or not leading:
            return base
        relaxed = statistics.fmean(leading) * config.dynamic_prune_threshold_relax_ratio
        highest = config.max_dynamic_prune_threshold
        return relaxed if base < relaxed < (2 * base if highest is None else highest) else base

    def _sample(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.stride == 1 or hidden.dim() < 2 else hidden[:, :: self.stride]


class PruneRun:
    """One section during one forward.

    Args:
        section: The section.
        state: Its state on the branch that this forward belongs to.
    """

    def __init__(self, section: Section, state: PruneState):
        self.section = section
        self.state = state
        self.guard = Guard(section)
        self.encoder: torch.Tensor | None = None  # newest encoder stream of patterns that only return it
        self.opened = False
        self.wrote = False
        self.bypassed = False

    def sites(self, link: Link, blocks: list[nn.Module]) -> Iterator[Any]:
        section = self.section
        exempt = set(section.config.non_prune_block_ids) if isinstance(section.config, DBPruneConfig) else set()
        pattern = link.signature.pattern
        for number, block in enumerate(blocks, link.offset):
            if section.first <= number <= section.last and number not in exempt:
                yield _Prunable(block, self, link, number)
            elif pattern.Forward_H_only and not pattern.Return_H_Only:
                yield _Tracked(block, self, link)
            else:
                yield block

    def close(self) -> None:
        if self.section.in_place is None and self.opened:
            self.section.in_place = self.wrote
        self.state.close(self.section.total, self.opened)

    def call(self, block: nn.Module, number: int, link: Link, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute or prune one block."""
        signature, state = link.signature, self.state
        pattern = signature.pattern
        hidden = signature.hidden(args, kwargs)
        encoder = self.encoder if pattern.Forward_H_only else signature.encoder(args, kwargs)
        unknown = pattern.Forward_H_only and not pattern.Return_H_Only and encoder is None
        streams = [hidden] if encoder is None or pattern.Return_H_Only else [hidden, encoder]
        self.bypassed = self.bypassed or any(stream.requires_grad for stream in streams)
        if self.bypassed or unknown:
            output = block(*args, **kwargs)
            self.encoder = pattern.unpack(block, output)[1]
            return output
        if not self.opened:
            state.open(streams)
            self.opened = True
        if state.prunes(number, hidden):
            outputs = state.forecast(number, streams)
            self.encoder = outputs[1] if len(outputs) == 2 else None
            return pattern.pack(outputs[0], self.encoder)
        state.keep_input(number, hidden)
        inputs = [self.guard(stream) for stream in streams]
        output = block(*args, **kwargs)
        hidden, self.encoder = pattern.unpack(block, output)
        outputs = [hidden] if self.encoder is None else [hidden, self.encoder]
        check_shapes(block, inputs, outputs)
        self.wrote = self.guard.compare() or self.wrote
        state.store(number, inputs, outputs)
        return output


class _Prunable(Site):
    __slots__ = ("number",)

    def __init__(self, block: nn.Module, run: PruneRun, link: Link, number: int):
        super().__init__(block, run, link)
        self.number = number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run.call(self.block, self.number, self.link, args, kwargs)


class _Tracked(Site):
    """A block that is always computed, where the encoder stream is only returned, never taken (patterns 4 and 5)."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        _, self.run.encoder = self.link.signature.pattern.unpack(self.block, output)
        return output
