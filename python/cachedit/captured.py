"""What captures a forward, and a captured forward whose decisions were known beforehand.

What changes from step to step is read from the device: the forward's tensors, the ring's slot, the forecast's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from .blocks import Section, run_sections
from .body import SectionRun
from .context import SectionState
from .metric import HeadResidual, Measured
from .policy import Decision

__all__ = ["Backend", "Captured", "Forward", "KnownForward", "TorchGraphs"]


class Forward(NamedTuple):
    """A cached forward that is to be captured."""

    controller: Any
    original: Callable[..., Any]
    """The transformer's own."""
    branch: Any
    """The guidance branch that it belongs to; its states are ``SectionState``, with buffers laid out."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[torch.Tensor]
    """Those in ``args`` and ``kwargs``: places of the graph's own, which are filled before each replay."""
    pool: Hashable
    """For :class:`Backend`."""

    @property
    def states(self) -> list[SectionState]:
        return self.branch.states  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


class Backend(Protocol):
    """What captures and replays.

    Of captures with equal ``pool`` no two run at the same time, and no result is needed once another one has run.
    """

    def refuses(self, device: torch.device) -> str | None:
        """Why nothing on this device can be captured, or None."""
        ...

    def refuses_decisions(self) -> str | None:
        """Why :class:`cachedit_kernels.graphs.StepGraph` cannot be used, or None."""
        ...

    def capture(self, run: Callable[[], Any], pool: Hashable) -> tuple[Any, Callable[[], None]]:
        """Run once; return what it returned, and a function that computes it anew, in place."""
        ...

    def piece(self, run: Callable[[], Any], pool: Hashable) -> tuple[Any, Any]:
        """Run once, which it has before; return what it returned, and a graph for ``StepGraph`` that does it anew.

        Later pieces of the same pool may be captured before this one has been replayed.
        """
        ...


class TorchGraphs:
    """CUDA graphs as torch has them."""

    def __init__(self) -> None:
        self.pools: dict[Hashable, Any] = {}

    def refuses(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"CUDA graphs need a CUDA device, not {device.type}"

    def refuses_decisions(self) -> str | None:
        from cachedit_kernels.graphs import unavailable

        return unavailable()

    def capture(self, run: Callable[[], Any], pool: Hashable) -> tuple[Any, Callable[[], None]]:
        run()  # whatever is compiled or chosen at a first run
        output, graph = self._capture(run, pool, torch.cuda.CUDAGraph())
        return output, graph.replay

    def piece(self, run: Callable[[], Any], pool: Hashable) -> tuple[Any, Any]:
        return self._capture(run, pool, torch.cuda.CUDAGraph(keep_graph=True))

    def _capture(self, run: Callable[[], Any], pool: Hashable, graph: Any) -> tuple[Any, Any]:
        handle = self.pools.setdefault(pool, torch.cuda.graph_pool_handle())
        with torch.cuda.graph(graph, pool=handle, capture_error_mode="thread_local"):
            output = run()
        return output, graph


class Captured:
    """A forward that was captured.

    Args:
        inputs: Places of its own for the tensors that it is called with.
    """

    def __init__(self, inputs: list[torch.Tensor]):
        self.inputs = inputs
        self.output: Any = None
        self.replays = 0

    def replay(self, states: list[SectionState], inputs: Sequence[torch.Tensor]) -> Any:
        """Run it on these inputs, and return its output, which the next replay writes over."""
        for place, given in zip(self.inputs, inputs, strict=True):
            place.copy_(given)
        self.run(states)
        self.replays += 1
        return self.output

    def run(self, states: list[SectionState]) -> None:
        """Take one step, by states whose buffers it was captured with."""
        raise NotImplementedError


class _Buffers(NamedTuple):
    """What a section's captured operators read in place of numbers."""

    slot: torch.Tensor
    weights: torch.Tensor


class KnownForward(Captured):
    """A captured forward whose decisions were known.

    Args:
        forward: What to capture.
        verdicts: Per section, whether the step is reused.
        backend: Captures it.

    Raises:
        Exception: Whatever keeps it from being captured.
    """

    def __init__(self, forward: Forward, verdicts: tuple[bool, ...], backend: Backend):
        super().__init__(forward.tensors)
        self.verdicts = verdicts
        with torch.inference_mode(False), torch.no_grad():
            self.buffers = [
                _Buffers(
                    torch.zeros((), dtype=torch.int64, device=forward.device),
                    torch.zeros((2, state.residuals.slots), dtype=torch.float32, device=forward.device),
                )
                for state in forward.states
            ]
        self._point(forward.states)
        sections = forward.controller.sections

        def run() -> Any:
            runs = [_KnownRun(*each) for each in zip(sections, forward.states, verdicts, self.buffers, strict=True)]
            with run_sections(forward.controller, runs, forward.branch, forward.args, forward.kwargs):
                output = forward.original(*forward.args, **forward.kwargs)
            for each in runs:
                each.close()
            return output

        self.output, self._replay = backend.capture(run, forward.pool)

    def run(self, states: list[SectionState]) -> None:
        self._point(states)
        self._replay()
        for state, reused in zip(states, self.verdicts, strict=True):
            state.note(Decision.REUSE if reused else Decision.COMPUTE, None)

    def _point(self, states: list[SectionState]) -> None:
        """Have the captured operators work on this step."""
        for state, buffers, reused in zip(states, self.buffers, self.verdicts, strict=True):
            residuals = state.residuals
            if reused:
                rows = residuals.weights(state.policy.step)
                pinned = torch.tensor(rows, dtype=torch.float32, pin_memory=buffers.weights.is_cuda)
                buffers.weights.copy_(pinned, non_blocking=True)  # torch keeps it until the copy has been made
            else:
                buffers.slot.fill_(residuals.next_slot)


class _KnownRun(SectionRun):
    """A section in a forward whose decision is known."""

    def __init__(self, section: Section, state: SectionState, reused: bool, buffers: _Buffers):
        super().__init__(section, state)
        self.reused = reused
        self.buffers = buffers
        self.stored = False

    def decide(self, seen: Measured, streams: list[torch.Tensor]) -> bool:
        if not self.reused and self.state.policy.measures:
            assert isinstance(self.state.metric, HeadResidual)
            self.state.metric.write(seen)
        return self.reused

    def forecast(self, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        residuals = self.state.residuals
        return residuals.forecast_by(self.buffers.weights, streams[: len(residuals.rings)])

    def store(self, outputs: list[torch.Tensor]) -> None:
        self.state.residuals.write(self.buffers.slot, self.inputs, outputs)
        self.stored = True

    def close(self) -> None:
        if not (self.reuse if self.reused else self.stored):
            raise RuntimeError(f"the forward did not run through {self.section.name} as a cached one does")
