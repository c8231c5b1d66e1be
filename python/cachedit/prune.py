"""DBPrune's part of a forward: every block decides for itself whether to be computed or to add its stored residual."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import cachedit_kernels as kernels

from .blocks import EagerSite, Guard, Link, Section, Site, called_again, onload_group
from .calibrator import CalibratorConfig
from .config import DBPruneConfig
from .context import State
from .metric import relative
from .pattern import check_object, check_shapes
from .policy import Decision
from .store import ResidualStore, allocate

__all__ = ["PruneRun", "PruneState"]

SAMPLED = 4  # of so many tokens one is compared, with force_reduce_calibrator_vram
LEADING = 5  # differences that the dynamic threshold follows

Outputs = list[torch.Tensor] | None  # None: the block is computed


class _Block:
    """What is known of one block: its input when it was last computed, and its residuals."""

    __slots__ = ("previous", "residuals")

    def __init__(self, residuals: ResidualStore):
        self.residuals = residuals
        self.previous: torch.Tensor | None = None


class PruneState(State):
    """State of one section on one branch of a request.

    Args:
        config: Validated cache configuration.
        calibrator_config: Validated calibrator configuration, or None for plain reuse.
        total: Number of blocks.
        group: Ranks that hold the other pieces of the streams, and decide alike.
    """

    config: DBPruneConfig

    def __init__(
        self, config: DBPruneConfig, calibrator_config: CalibratorConfig | None, total: int, group: Any = None
    ):
        super().__init__(config, calibrator_config, group)
        self.prunable = config.prunable_blocks(total)
        self.blocks: dict[int, _Block] = {}
        self.runs: dict[int, int] = {}  # by block: how many in a row were pruned from there at the step before
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

    # One step: open(), for each block prune(), else keep_input() and store(), then close().

    def open(self, streams: list[torch.Tensor]) -> None:
        """The first block of a step that may be pruned gets these streams: decide what concerns all blocks."""
        if self.policy.refresh_due():
            self.forget()
        self.check_streams(streams)
        self.verdict = self.policy.plan()
        self.diffs: list[float] = []
        self.pruned: set[int] = set()
        self.decided: dict[int, tuple[list[torch.Tensor], Outputs]] = {}  # by block: inputs, outputs

    def prune(self, number: int, streams: list[torch.Tensor]) -> Outputs:
        """Return what a block that is pruned passes on, or None for one that is to be computed."""
        if self.verdict is Decision.COMPUTE or not self._is_stored(number):
            return None
        if self.verdict is Decision.REUSE:
            outputs: Outputs = self._forecast(number, streams)
        else:
            inputs, outputs = self.decided.pop(number, ([], None))
            if len(inputs) != len(streams) or any(a is not b for a, b in zip(inputs, streams, strict=True)):
                self._decide_from(number, streams)
                outputs = self.decided.pop(number)[1]
        if outputs is not None:
            self.pruned.add(number)
        return outputs

    def _decide_from(self, number: int, streams: list[torch.Tensor]) -> None:
        """Decide a block, and with it as many as were pruned after it at the step before, waiting once for all.

        Each block is measured on what the one before passes on if it is pruned; what was found beyond the first block
        that is not pruned is void. A loop that changes the streams between blocks is noticed when they come.
        """
        numbers = [number]
        while len(numbers) <= self.runs.get(number, 0) and self._is_stored(numbers[-1] + 1):
            numbers.append(numbers[-1] + 1)
        inputs = [streams]
        sums: list[torch.Tensor] = []
        for n in numbers:
            if sums:
                inputs.append(self._forecast(n - 1, inputs[-1]))
            sums.append(kernels.l1([self.blocks[n].previous], [self._sample(inputs[-1][0])]))  # type: ignore[list-item]
        self.decided.clear()
        for i, diff in enumerate(relative(sums[0] if len(sums) == 1 else torch.cat(sums), self.group)):
            outputs: Outputs = None
            if self._below_threshold(numbers[i], diff):
                outputs = inputs[i + 1] if i + 1 < len(inputs) else self._forecast(numbers[i], inputs[i])
            self.decided[numbers[i]] = inputs[i], outputs
            if outputs is None:
                return

    def _below_threshold(self, number: int, diff: float) -> bool:
        if not math.isfinite(diff):
            self.policy.nonfinite += 1
            self.blocks[number].residuals.forget()  # what is stored may be as bad, and forecasts weigh several steps
            return False
        threshold = self._threshold()
        self.diffs.append(diff)
        self.policy.reason = "diff"
        return diff < threshold

    def _is_stored(self, number: int) -> bool:
        return number in self.blocks and bool(self.blocks[number].residuals.steps)

    def _forecast(self, number: int, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        return self.blocks[number].residuals.forecast(self.policy.step, streams)

    def keep_input(self, number: int, hidden: torch.Tensor) -> None:
        """Keep the input of a block that is about to be computed, if differences are measured at all."""
        block = self.blocks.get(number)
        if block is None:
            residuals = ResidualStore(self.calibrator_config, self.group, self.config.residual_float8)
            block = self.blocks[number] = _Block(residuals)
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
        run = 0
        for number in sorted(self.prunable, reverse=True):
            run = run + 1 if number in self.pruned else 0
            self.runs[number] = run
        diff = statistics.fmean(self.diffs) if self.diffs else None
        decision = Decision.REUSE if self.pruned else Decision.COMPUTE
        self.policy.record(decision, diff, pruned=len(self.pruned), blocks=blocks)

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
        # What the newest block returned in the encoder's place: that stream, or an object that is no tensor.
        self.encoder: torch.Tensor | None = None
        self.object: Any = None
        self.opened = False
        self.called: set[int] = set()
        self.wrote = False
        self.bypassed = False

    def sites(self, link: Link, blocks: list[nn.Module]) -> Iterator[Any]:
        pattern = link.signature.pattern
        for number, block in enumerate(blocks, link.offset):
            if number in self.state.prunable:
                yield _Prunable(block, self, link, number)
                continue
            if self.opened and number - 1 in self.state.pruned:
                onload_group(block)
            if not pattern.Return_H_Only:
                yield _Tracked(block, self, link)
            else:
                yield block

    def close(self) -> None:
        if self.section.in_place is None and self.opened:
            self.section.in_place = self.wrote
        self.state.close(self.section.total, self.opened)

    def track(self, block: nn.Module, second: Any) -> None:
        """Note what a block returned in the place of the encoder stream."""
        self.encoder = second if isinstance(second, torch.Tensor) else None
        if self.encoder is None:
            if self.object is not None:
                check_object(block, second, self.object)
            self.object = second

    def call(self, site: Site, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute or prune one block."""
        if number in self.called:
            raise called_again(self.section)
        self.called.add(number)
        block, state, pattern = site.block, self.state, site.link.signature.pattern
        hidden = site.hidden(args, kwargs)
        encoder = self.encoder if pattern.Forward_H_only else site.encoder(args, kwargs)
        encoder = encoder if isinstance(encoder, torch.Tensor) else None
        unknown = pattern.Forward_H_only and not pattern.Return_H_Only and encoder is None and self.object is None
        streams = [hidden] if encoder is None or pattern.Return_H_Only else [hidden, encoder]
        self.bypassed = self.bypassed or any(stream.requires_grad for stream in streams)
        if self.bypassed or unknown:
            output = block(*args, **kwargs)
            self.track(block, pattern.unpack(block, output)[1])
            return output
        if not self.opened:
            state.open(streams)
            self.opened = True
        pruned = state.prune(number, streams)
        if pruned is not None:
            outputs = pruned
            self.encoder = outputs[1] if len(outputs) == 2 else None
            return pattern.pack(outputs[0], self.object if self.encoder is None else self.encoder)
        if number - 1 in state.pruned:
            onload_group(block)
        state.keep_input(number, hidden)
        inputs = [self.guard(stream) for stream in streams]
        output = block(*args, **kwargs)
        hidden, second = pattern.unpack(block, output)
        self.track(block, second)
        outputs = [hidden] if self.encoder is None else [hidden, self.encoder]
        check_shapes(block, inputs, outputs)
        self.wrote = self.guard.compare() or self.wrote
        state.store(number, inputs, outputs)
        return output


class _Prunable(EagerSite):
    __slots__ = ("number",)

    def __init__(self, block: nn.Module, run: PruneRun, link: Link, number: int):
        super().__init__(block, run, link)
        self.number = number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run.call(self, self.number, args, kwargs)


class _Tracked(EagerSite):
    """A block that is always computed, where it returns two values: the second may be known from nowhere else."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        self.run.track(self.block, self.link.signature.pattern.unpack(self.block, output)[1])
        return output
