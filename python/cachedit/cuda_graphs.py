"""CUDA graphs of whole forwards. Experimental: not yet run on a GPU.

Most configurations are decided on the device (``device_steps.py``): a step is one launch. For the others, and where
such a graph cannot be made, the host decides: where warm-up, a static mask or a limit settles a step before it runs, it
launches the forward that computes the body or the one that reuses it (``captured.py``), and steps that have to be
measured run eagerly, because their decision lies in the middle of the forward.

A state's buffers are baked into its graphs, so requests and guidance branches that take turns have graphs of their own.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch.utils import _pytree as pytree

from .blocks import Section
from .captured import Backend, Captured, Forward, KnownForward, TorchGraphs
from .context import SectionState, State
from .device_steps import DecidedForward, refuses
from .kept import KeptOutputs
from .parallel.state import is_parallel
from .policy import Decision, Policy
from .request import Branch

__all__ = ["ForwardGraphs"]

logger = logging.getLogger(__name__)

CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)  # what a graph may be keyed by

_MISSING = object()

Verdicts = tuple[bool, ...] | None  # per section, whether the step is reused; None: the device decides


class ForwardGraphs:
    """Captured forwards of one transformer, the least recently used first.

    A forward is told by the shapes, dtypes and other values of its arguments, by the verdict of each section if the
    host decides, and by the buffers it uses. The first one of its kind runs eagerly: buffers are laid out, blocks that
    write into their inputs found out.

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
        self.graphs: OrderedDict[Hashable, Captured | None] = OrderedDict()  # None: cannot be captured
        self.seen: OrderedDict[Hashable, None] = OrderedDict()  # arguments and buffers of eager forwards
        self.replays = self.evicted = 0
        self.eager: Counter[str] = Counter()  # forwards that ran eagerly, by why
        self._lock = threading.Lock()
        self._said: set[str] = set()

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
        reason = self._refuses(branch, leaves)
        if reason is not None:
            return self._run_eagerly(reason, eagerly)
        call = (structure, tuple(map(_describe, leaves)), _modes(), self._weights())
        kind = (call, _buffers(branch))
        states = cast("list[SectionState]", branch.states)  # as _refuses has made sure of
        if kind not in self.seen:
            output = self._run_eagerly("the first of its kind", eagerly, watched=True)
            self._note((call, _buffers(branch)))
            return output
        on_device = self._decides_on_device(states, kind)
        verdicts = None if on_device else _verdicts(states)
        if isinstance(verdicts, str):
            return self._run_eagerly(verdicts, eagerly)
        key = (verdicts, *kind)
        with self._lock:
            known, captured = key in self.graphs, self.graphs.get(key)
            if known:
                self.graphs.move_to_end(key)
        if not known:
            captured = self._capture(original, branch, verdicts, leaves, structure)
            with self._lock:
                self._keep(key, captured)
        if captured is None:
            if on_device:  # the host decides from now on
                return self.forward(original, branch, args, kwargs, eagerly)
            return self._run_eagerly("it cannot be captured", eagerly)
        output = captured.replay(states, _tensors(leaves))
        self.replays += 1
        return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, output)

    def _run_eagerly(self, reason: str, eagerly: Callable[[], Any], watched: bool = False) -> Any:
        self.eager[reason] += 1
        passes = self.controller.passes
        if passes.watched or not watched:
            return eagerly()
        with KeptOutputs(self.controller) as watch:
            output = eagerly()
        passes.watched, passes.outputs_are_kept = watch.complete, watch.found
        return output

    def _note(self, kind: Hashable) -> None:
        """A forward with these arguments and buffers has run eagerly: the next one like it may be captured."""
        with self._lock:
            self.seen[kind] = None
            self.seen.move_to_end(kind)
            if len(self.seen) > 4 * self.max_graphs:
                self.seen.popitem(last=False)

    def _refuses(self, branch: Branch, leaves: list[Any]) -> str | None:
        """Why this forward cannot be a graph, whatever is decided, or None."""
        if other := _other_than_tensors(leaves):
            return f"an argument is {other}"
        tensors = _tensors(leaves)
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
        refused = map(_refuses_section, branch.states, self.controller.sections)
        return next((reason for reason in refused if reason), None)

    def _decides_on_device(self, states: list[SectionState], kind: tuple[Hashable, Hashable]) -> bool:
        """Whether this step is decided on the device; if it never will, says why."""
        if all(state.device is None and state.policy.static for state in states):
            return False  # the host knows as well, and nothing needs to be conditional
        if self.graphs.get((None, *kind), _MISSING) is None:
            return False  # it was tried
        reason = self.backend.refuses_decisions()
        reasons = (refuses(state, self.controller.passes) for state in states)
        reason = reason or next((each for each in reasons if each), None)
        if reason is not None:
            self._say(logging.INFO, f"steps of {self._name} are decided on the host: {reason}")
        return reason is None

    def _capture(
        self, original: Callable[..., Any], branch: Branch, verdicts: Verdicts, leaves: list[Any], structure: Any
    ) -> Captured | None:
        with torch.inference_mode(False), torch.no_grad():
            places = [torch.empty_like(tensor).copy_(tensor) for tensor in _tensors(leaves)]
        remaining = iter(places)
        args, kwargs = pytree.tree_unflatten(
            [next(remaining) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], structure
        )
        forward = Forward(self.controller, original, branch, args, kwargs, places, _buffers(branch))
        captured: Captured
        try:
            if hooked := _hooked(self.controller.transformer):
                raise RuntimeError(f"{hooked} has hooks")
            if verdicts is None:
                captured = DecidedForward(forward, self.backend)
            else:
                captured = KnownForward(forward, verdicts, self.backend)
            if other := _other_than_tensors(captured.output):
                raise RuntimeError(f"it returns {other}")
        except Exception as error:  # whatever it is: the same forward runs eagerly, and raises it if it is the model's
            if verdicts is None:
                self._say(logging.INFO, f"steps of {self._name} are decided on the host, no graph can: {error}")
            else:
                self._say(logging.WARNING, f"a forward of {self._name} cannot be captured: {error}")
            return None
        return captured

    def _keep(self, key: Hashable, captured: Captured | None) -> None:
        self.graphs[key] = captured
        while len(self.graphs) > self.max_graphs:
            _, dropped = self.graphs.popitem(last=False)
            self.evicted += 1
            if dropped is not None and dropped.replays <= 1:
                self._say(
                    logging.WARNING,
                    f"CUDA graphs are dropped before they are used again: more than max_graphs={self.max_graphs} kinds "
                    "of forwards take turns, or an argument that is no tensor changes from step to step",
                )

    def _weights(self) -> int:
        """Where the parameters are: a graph of others would compute with what is no longer there."""
        return hash(tuple([parameter.data_ptr() for parameter in self.parameters]))

    @property
    def _name(self) -> str:
        return type(self.controller.transformer).__name__

    def _say(self, level: int, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.log(level, "%s", message)


def _verdicts(states: list[SectionState]) -> tuple[bool, ...] | str:
    """Per section, whether the step is reused; or why the host does not know yet."""
    verdicts = []
    for state in states:
        if state.policy.refresh_due():
            state.forget()
        decision = state.policy.plan()
        if decision is Decision.MEASURE:
            return "a step that has to be measured"
        verdicts.append(decision is Decision.REUSE)
    return tuple(verdicts)


def _refuses_section(state: State, section: Section) -> str | None:
    """Why steps of this section are not captured, or None."""
    if state.device is not None:
        return None  # a graph decides them: nothing is to be asked of the policy
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
            places += [(buffer.data_ptr(), buffer.shape, buffer.dtype) for buffer in state.buffers]
        places.append(None)
    return tuple(places)


def _tensors(leaves: list[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
