"""CUDA graphs of whole forwards: steps that are decided beforehand are replayed. Experimental: not yet run on a GPU.

Where warm-up, a static mask or a limit settles a step before it runs, the host knows which of two forwards it will be,
the one that computes the body or the one that reuses it, and launches the captured one. Steps that have to be measured
run eagerly: their decision lies in the middle of the forward.

What changes from step to step is read from the device: the forward's tensors, the ring's slot, the forecast's weights.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch.utils import _pytree as pytree

from .blocks import Section, run_sections
from .body import SectionRun
from .context import SectionState, State
from .metric import Measured
from .parallel.state import is_parallel
from .policy import Decision, Policy
from .request import Branch

__all__ = ["ForwardGraphs"]

logger = logging.getLogger(__name__)

CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)  # what a graph may be keyed by


class Backend(Protocol):
    """What captures and replays."""

    def refuses(self, device: torch.device) -> str | None:
        """Why nothing on this device can be captured, or None."""
        ...

    def capture(self, run: Callable[[], Any], pool: Hashable) -> tuple[Any, Callable[[], None]]:
        """Run once; return what it returned, and a function that computes it anew, in place.

        Of calls with equal ``pool`` no two run at the same time, and no result is needed once another one has run.
        """
        ...


class TorchGraphs:
    """CUDA graphs as torch has them."""

    def __init__(self) -> None:
        self.pools: dict[Hashable, Any] = {}

    def refuses(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"CUDA graphs need a CUDA device, not {device.type}"

    def capture(self, run: Callable[[], Any], pool: Hashable) -> tuple[Any, Callable[[], None]]:
        run()  # whatever is compiled or chosen at a first run
        handle = self.pools.setdefault(pool, torch.cuda.graph_pool_handle())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=handle, capture_error_mode="thread_local"):
            output = run()
        return output, graph.replay


class _Buffers(NamedTuple):
    """What a section's captured operators read in place of numbers."""

    slot: torch.Tensor
    weights: torch.Tensor


class _CapturedRun(SectionRun):
    """A section in a forward whose decision is known."""

    def __init__(self, section: Section, state: SectionState, reused: bool, buffers: _Buffers):
        super().__init__(section, state)
        self.reused = reused
        self.buffers = buffers
        self.stored = False

    def decide(self, seen: Measured, streams: list[torch.Tensor]) -> bool:
        if not self.reused and self.state.policy.measures:
            self.state.metric.keep(seen, True)
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


class _Captured:
    """A forward that was captured: its inputs and outputs have places of their own."""

    def __init__(self, inputs: list[torch.Tensor], buffers: list[_Buffers]):
        self.inputs = inputs
        self.buffers = buffers
        self.output: Any = None
        self.replay: Callable[[], None] | None = None
        self.replays = 0

    def fill(self, inputs: Sequence[torch.Tensor]) -> None:
        for place, given in zip(self.inputs, inputs, strict=True):
            place.copy_(given)


class ForwardGraphs:
    """Captured forwards of one transformer, the least recently used first.

    A forward is told by the shapes, dtypes and other values of its arguments, by the verdict of each section, and by
    the buffers it uses. The first one of its kind runs eagerly: buffers are laid out, blocks that write into their
    inputs found out.

    Args:
        controller: The transformer's controller.
        max_graphs: Keep so many.
        backend: Captures and replays.

    Raises:
        ValueError: If ``max_graphs`` is below 1 or the transformer's work is split among ranks.
    """

    def __init__(self, controller: Any, max_graphs: int = 16, backend: Backend | None = None):
        if isinstance(max_graphs, bool) or not isinstance(max_graphs, int) or max_graphs < 1:
            raise ValueError(f"max_graphs must be an integer of at least 1, got {max_graphs!r}")
        if is_parallel(controller.transformer):
            raise ValueError("CUDA graphs: the transformer's work is split among ranks, which decide together")
        self.controller = controller
        self.max_graphs = max_graphs
        self.backend = TorchGraphs() if backend is None else backend
        self.parameters = list(controller.transformer.parameters())
        self.graphs: OrderedDict[Hashable, _Captured | None] = OrderedDict()  # None: cannot be captured
        self.seen: OrderedDict[Hashable, None] = OrderedDict()  # arguments and buffers of eager forwards
        self.replays = self.evicted = 0
        self.eager: Counter[str] = Counter()  # forwards that ran eagerly, by why
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def __deepcopy__(self, memo: Any) -> None:
        return None  # a copied model has other parameters: enable it there

    def __str__(self) -> str:
        held = sum(captured is not None for captured in self.graphs.values())
        text = f"CUDA graphs: {held} held, {self.replays} forwards replayed, {self.evicted} dropped"
        return "; ".join([text, *(f"eager {count}x: {reason}" for reason, count in self.eager.items())])

    def clear(self) -> None:
        """Drop all: they were captured with another configuration."""
        with self._lock:
            self.graphs.clear()
            self.seen.clear()

    def forward(
        self, original: Callable[..., Any], branch: Branch, args: Any, kwargs: Any, eagerly: Callable[[], Any]
    ) -> Any:
        """Replay the forward if there is a graph of it, or there can be one; else run it eagerly.

        Args:
            original: The transformer's own forward.
            branch: The guidance branch that it belongs to.
            args: Positional arguments of the forward.
            kwargs: Its other arguments.
            eagerly: Runs the cached forward without graphs.
        """
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        verdicts = self._verdicts(branch, leaves, tensors)
        if isinstance(verdicts, str):
            self.eager[verdicts] += 1
            return eagerly()
        call = (structure, tuple(map(_describe, leaves)), _modes(), self._weights())
        buffers = _buffers(branch)
        if (call, buffers) not in self.seen:
            self.eager["the first of its kind"] += 1
            output = eagerly()
            self._note((call, _buffers(branch)))
            return output
        states = cast("list[SectionState]", branch.states)  # as _verdicts has made sure of
        key = (verdicts, call, buffers)
        with self._lock:
            known, captured = key in self.graphs, self.graphs.get(key)
            if known:
                self.graphs.move_to_end(key)
        if not known:
            captured = self._capture(original, branch, states, verdicts, leaves, structure)
            with self._lock:
                self._keep(key, captured)
        if captured is None or captured.replay is None:
            self.eager["it cannot be captured"] += 1
            return eagerly()
        captured.fill(tensors)
        for state, numbers, reused in zip(states, captured.buffers, verdicts, strict=True):
            _point(state, numbers, reused)
        captured.replay()
        self.replays += 1
        captured.replays += 1
        for state, reused in zip(states, verdicts, strict=True):
            _account(state, reused)
        return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, captured.output)

    def _note(self, kind: Hashable) -> None:
        """A forward with these arguments and buffers has run eagerly: the next one like it may be captured."""
        with self._lock:
            self.seen[kind] = None
            self.seen.move_to_end(kind)
            if len(self.seen) > 4 * self.max_graphs:
                self.seen.popitem(last=False)

    def _verdicts(self, branch: Branch, leaves: list[Any], tensors: list[torch.Tensor]) -> tuple[bool, ...] | str:
        """Per section, whether the step is reused; or why it cannot be a graph."""
        if other := _other_than_tensors(leaves):
            return f"an argument is {other}"
        if not tensors or not self.parameters:
            return "no tensors to tell the device by"
        device = tensors[0].device
        if reason := self.backend.refuses(device):
            return reason
        if any(tensor.device != device for tensor in (*tensors, *self.parameters)):
            return f"not everything is on {device}"
        if torch.is_autocast_enabled(device.type):
            return "autocast is on"  # it keeps casts of weights between calls, which a graph would not make anew
        if is_parallel(self.controller.transformer):
            return "its work is split among ranks"
        if self.controller.transformer.training:
            return "the transformer is in training mode"
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return "gradients are wanted"
        verdicts = []
        for state, section in zip(branch.states, self.controller.sections, strict=True):
            if reason := _refuses(state, section):
                return reason
            if state.policy.refresh_due():
                state.forget()
            decision = state.policy.plan()
            if decision is Decision.MEASURE:
                return "a step that has to be measured"
            verdicts.append(decision is Decision.REUSE)
        return tuple(verdicts)

    def _capture(
        self,
        original: Callable[..., Any],
        branch: Branch,
        states: list[SectionState],
        verdicts: tuple[bool, ...],
        leaves: list[Any],
        structure: Any,
    ) -> _Captured | None:
        with torch.inference_mode(False), torch.no_grad():
            places = [torch.empty_like(leaf).copy_(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
            device = places[0].device
            buffers = [
                _Buffers(
                    torch.zeros((), dtype=torch.int64, device=device),
                    torch.zeros((2, state.residuals.slots), dtype=torch.float32, device=device),
                )
                for state in states
            ]
        captured = _Captured(places, buffers)
        for state, numbers, reused in zip(states, buffers, verdicts, strict=True):
            _point(state, numbers, reused)
        remaining = iter(places)
        args, kwargs = pytree.tree_unflatten(
            [next(remaining) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], structure
        )
        sections = self.controller.sections

        def run() -> Any:
            runs = [_CapturedRun(*each) for each in zip(sections, states, verdicts, buffers, strict=True)]
            with run_sections(self.controller, runs, branch, args, kwargs):
                output = original(*args, **kwargs)
            for each in runs:
                each.close()
            if other := _other_than_tensors(output):
                raise RuntimeError(f"it returns {other}")
            return output

        try:
            if hooked := _hooked(self.controller.transformer):
                raise RuntimeError(f"{hooked} has hooks")
            captured.output, captured.replay = self.backend.capture(run, _buffers(branch))
        except Exception as error:  # whatever it is: the same forward runs eagerly, and raises it if it is the model's
            self._warn(f"a forward of {type(self.controller.transformer).__name__} cannot be captured: {error}")
            return None
        return captured

    def _keep(self, key: Hashable, captured: _Captured | None) -> None:
        self.graphs[key] = captured
        while len(self.graphs) > self.max_graphs:
            _, dropped = self.graphs.popitem(last=False)
            self.evicted += 1
            if dropped is not None and dropped.replays <= 1:
                self._warn(
                    f"CUDA graphs are dropped before they are used again: more than max_graphs={self.max_graphs} kinds "
                    "of forwards take turns, or an argument that is no tensor changes from step to step"
                )

    def _weights(self) -> int:
        """Where the parameters are: a graph of others would compute with what is no longer there."""
        return hash(tuple([parameter.data_ptr() for parameter in self.parameters]))

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s", message)


def _refuses(state: State, section: Section) -> str | None:
    """Why steps of this section are not captured, or None."""
    if not isinstance(state, SectionState) or type(state.policy) is not Policy or state.tap is not None:
        return f"{type(state.config).__name__} decides otherwise"
    if state.group is not None:
        return "other ranks decide as well"
    if state.borrows_from is not None:
        return "another branch is measured (cfg_diff_compute_separate=False)"
    if state.residuals.fitter is not None:
        return f"{type(state.residuals.fitter).__name__} reads residuals back"
    if section.body == 0:
        return f"{section.name} has nothing to reuse"
    return None


def _hooked(transformer: torch.nn.Module) -> str | None:
    """A module within that has hooks of accelerate or diffusers, which may move weights."""
    name: str
    for name, module in transformer.named_modules():
        if name and ("_hf_hook" in vars(module) or "_diffusers_hook" in vars(module)):
            return name
    return None


def _other_than_tensors(tree: Any) -> str | None:
    """The type of something in there that a graph neither reads anew nor can be keyed by."""
    for leaf in pytree.tree_leaves(tree):
        if not isinstance(leaf, (torch.Tensor, *CONSTANTS)):
            return str(type(leaf).__name__)
    return None


def _describe(leaf: Any) -> Hashable:
    """What of an argument is part of a graph."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride()
    return type(leaf), leaf


def _modes() -> Hashable:
    """What else the same call may compute differently by."""
    return torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision()


def _buffers(branch: Branch) -> Hashable:
    """Where residuals and anchors lie."""
    places: list[Hashable] = []
    for state in branch.states:
        if isinstance(state, SectionState):
            ring = getattr(state.metric, "ring", None)
            for buffer in (*state.residuals.rings, *([] if ring is None else [ring])):
                places.append((buffer.data_ptr(), buffer.shape, buffer.dtype))
        places.append(None)
    return tuple(places)


def _point(state: SectionState, buffers: _Buffers, reused: bool) -> None:
    """Have the captured operators work on this step."""
    residuals = state.residuals
    if reused:
        buffers.weights.copy_(torch.tensor(residuals.weights(state.policy.step)))
    else:
        buffers.slot.fill_(residuals.next_slot)


def _account(state: SectionState, reused: bool) -> None:
    """What a step that ran without the engine leaves behind."""
    if reused:
        state.policy.record(Decision.REUSE, None)
    else:
        state.residuals.note(state.policy.step)
        state.policy.record(Decision.COMPUTE, None)
