"""State of requests: one per image or video in the making, each with its guidance branches."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

from .blocks import Run, Section
from .body import SectionRun
from .config import DBPruneConfig
from .context import SectionState, State
from .prune import PruneRun, PruneState
from .scope import DEFAULT

if TYPE_CHECKING:
    from .watch import PipelineWatch

__all__ = ["Branch", "Loop", "Request", "Requests", "check_key"]

logger = logging.getLogger(__name__)


class Loop(NamedTuple):
    """A denoising loop, as a pipeline tells about it."""

    watch: PipelineWatch
    timesteps: Any
    """The scheduler's at that time; compared by identity only."""
    total_steps: int | None


class Branch:
    """One guidance branch of a request: one state per section.

    Args:
        name: As the pipeline calls it (``cache_context(name)``), or "cond", "uncond" or "default".
        sections: The transformer's sections.
        total_steps: Steps of the request, if known.
    """

    def __init__(self, name: str, sections: list[Section], total_steps: int | None):
        self.name = name
        self.sections = sections
        self.inputs: Any = None  # what the transformer's inputs are like, where a step is decided by that alone
        self.states: list[State] = [_new_state(section) for section in sections]
        self.begin(total_steps)

    def begin(self, total_steps: int | None) -> None:
        """Start a request."""
        self.grid: tuple[int, ...] | None = None  # of tokens, for SeaCache
        for state in self.states:
            state.begin(total_steps)

    def follow(self, first: Branch | None) -> None:
        """Have the differences of the request's first branch serve here, where the configuration says so."""
        for i, state in enumerate(self.states):
            if isinstance(state, SectionState) and not state.config.cfg_diff_compute_separate:
                other = None if first is None else first.states[i]
                state.borrows_from = other if isinstance(other, SectionState) else None

    @property
    def has_run(self) -> bool:
        """Whether it has run in this request."""
        return bool(self.states[0].policy.records)

    @property
    def step(self) -> int:
        """Steps of the request that are done."""
        return self.states[0].policy.step

    @step.setter
    def step(self, step: int) -> None:
        for state in self.states:
            state.policy.step = step

    @property
    def bytes_held(self) -> int:
        """Bytes of all buffers."""
        return sum(state.bytes_held for state in self.states)

    def runs(self) -> list[Run]:
        """What the lists hand out during one forward."""
        return [_new_run(section, state) for section, state in zip(self.sections, self.states, strict=True)]


class Request:
    """State of one request.

    Args:
        total_steps: Denoising steps, if known: a forward after the last one begins the next request.
    """

    def __init__(self, total_steps: int | None):
        self.branches: dict[str, Branch] = {}
        self.owner: int | None = None  # thread that runs a forward
        self.bytes_held = 0  # when its last forward ended, where there is a limit
        self.announced: Loop | None = None  # begins with the next forward
        self.loop: Loop | None = None  # that this request is
        self.calls = 0
        self.begin(total_steps)

    def begin(self, total_steps: int | None) -> None:
        """Start afresh: nothing of what was before is reused. Buffers stay, except of branches that went unused."""
        if self.calls:
            self.branches = {name: branch for name, branch in self.branches.items() if branch.has_run}
        self.total_steps = total_steps
        self.calls = 0  # forwards, over all branches
        self.step = 0  # that the newest forward belongs to
        self.order: list[str] = []  # of the branches, as they were first called
        self.position = -1  # of the newest forward's branch in this order
        self.turn = -1  # of the forward within its step, as far as the scheduler tells; else in the request
        self.scheduler_step: Any = None
        self.moved = self.moves = False  # whether the scheduler's step is another than at the forward before; ever was
        for branch in self.branches.values():
            branch.begin(total_steps)

    def heed(self, scheduler_step: Any) -> None:
        """Take note of the pipeline's scheduler before a forward: it moves on between steps, not between branches."""
        self.moved = self.turn >= 0 and scheduler_step != self.scheduler_step
        self.moves = self.moves or self.moved
        self.turn = 0 if self.moved else self.turn + 1
        self.scheduler_step = scheduler_step

    def branch(self, name: str, sections: list[Section], next_total: int | None = None) -> Branch:
        """Take the branch of a forward to the step that the forward belongs to.

        Steps are those of the request, not of the branch: a branch that skips some (guidance limited to an interval)
        follows masks, warm-up and forecasts at the same steps as the others. Where no scheduler tells, branches are
        taken to run in one order: a forward that does not come later in it than the one before begins the next step.

        Args:
            name: The branch.
            sections: The transformer's sections.
            next_total: Steps of the request that begins if this one is over. Default: as many again.
        """
        again = name in self.branches and self.branches[name].step > self.step
        not_later = name in self.order and self.order.index(name) <= self.position
        if self.moved or again or (not_later and not self.moves):
            self.step += 1
            if self.total_steps is not None and self.step >= self.total_steps:
                scheduler_step = self.scheduler_step
                self.begin(self.total_steps if next_total is None else next_total)
                self.heed(scheduler_step)
        if name not in self.order:
            self.order.append(name)
        self.position = self.order.index(name)
        branch = self.branches.get(name)
        if branch is None:
            branch = self.branches[name] = Branch(name, sections, self.total_steps)
        if not branch.has_run:
            branch.follow(next((other for other in self.branches.values() if other.has_run), None))
        branch.step = self.step
        return branch

    def count_bytes(self) -> int:
        """Count the bytes of all buffers."""
        return sum(branch.bytes_held for branch in self.branches.values())

    def release(self) -> None:
        """Drop the buffers; which step each branch is at is kept."""
        for branch in self.branches.values():
            for state in branch.states:
                state.release()
        self.bytes_held = 0


class Requests:
    """All requests of one transformer, the least recently used one first. Threads may call it at any time.

    Args:
        max_requests: Keep at most so many besides the default one; the least recently used is dropped.
        max_bytes: Let the least recently used requests drop their buffers, and compute their next step, once all
            requests together hold more. None: no limit.
    """

    def __init__(self, max_requests: int = 256, max_bytes: int | None = None):
        self._by_key: OrderedDict[Hashable, Request] = OrderedDict()
        # Guards the requests' owners as well: what runs is neither dropped nor freed. Reentrant, because freeing
        # memory may run a finalizer that drops a request.
        self._lock = threading.RLock()
        self._warned = False
        self.max_requests = max_requests
        self.max_bytes = max_bytes

    def __deepcopy__(self, memo: Any) -> Requests:
        return Requests(self.max_requests, self.max_bytes)  # a copied model has no requests under way

    def limit(self, max_requests: int, max_bytes: int | None) -> None:
        """Set the limits, which hold from now on."""
        with self._lock:
            self.max_requests, self.max_bytes = max_requests, max_bytes
            self._limit_count()
            for request in self._by_key.values():
                if request.owner is None:
                    request.bytes_held = request.count_bytes()
            self._limit_bytes()

    def enter(self, key: Hashable, total_steps: int | None) -> tuple[Request, int | None]:
        """A forward begins: return its request, made if there is none, and what to give to ``leave``.

        Raises:
            RuntimeError: If another thread is in a forward of this request; two at a time would mix up its steps.
        """
        with self._lock:
            request = self._get(key, total_steps)
            outer, request.owner = request.owner, threading.get_ident()
            self._limit_count()
        return request, outer

    def leave(self, request: Request, outer: int | None) -> None:
        """The forward has ended."""
        with self._lock:
            if self.max_bytes is not None:
                request.bytes_held = request.count_bytes()
                self._limit_bytes()  # while it counts as running: it keeps its own
            request.owner = outer

    def begin(self, key: Hashable, total_steps: int | None) -> None:
        """Start a request afresh.

        Raises:
            RuntimeError: If another thread is in a forward of it.
        """
        with self._lock:
            self._get(key, total_steps).begin(total_steps)

    def announce(self, key: Hashable, loop: Loop, total_steps: int | None) -> None:
        """Have a request begin with its next forward.

        Raises:
            RuntimeError: If another thread is in a forward of it.
        """
        with self._lock:
            self._get(key, total_steps).announced = loop

    def find(self, key: Hashable) -> Request | None:
        """The request of this key, if there is one."""
        return self._by_key.get(key)

    @property
    def latest(self) -> Request | None:
        """The request that was used last."""
        with self._lock:
            return next(reversed(self._by_key.values()), None)

    def drop(self, key: Hashable) -> None:
        """Drop a request and its buffers, if it is there."""
        check_key(key)
        with self._lock:
            self._by_key.pop(key, None)

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._by_key.clear()

    def _get(self, key: Hashable, total_steps: int | None) -> Request:
        request = self._by_key.get(key)
        if request is None:
            request = self._by_key[key] = Request(total_steps)
        elif request.owner not in (None, threading.get_ident()):
            raise RuntimeError(
                "two threads run one request of a cached transformer at the same time; give each its own state: "
                "with cachedit.request(transformer, key): ..."
            )
        self._by_key.move_to_end(key)
        return request

    def _limit_count(self) -> None:
        if len(self._by_key) <= self.max_requests:
            return
        idle = [key for key, request in self._by_key.items() if key is not DEFAULT and request.owner is None]
        excess = len(self._by_key) - (DEFAULT in self._by_key) - self.max_requests
        for key in idle[: max(excess, 0)]:
            self.drop(key)
            if not self._warned:
                self._warned = True
                logger.warning(
                    "more than %d requests at a time on one transformer: the least recently used are dropped and "
                    "start over; end requests with cachedit.drop_request, or raise the limit",
                    self.max_requests,
                )

    def _limit_bytes(self) -> None:
        if self.max_bytes is None:
            return
        total = sum(request.bytes_held for request in self._by_key.values())
        for request in list(self._by_key.values()):
            if total <= self.max_bytes:
                return
            if request.owner is None and request.bytes_held:
                total -= request.bytes_held
                request.release()


def check_key(key: Any) -> None:
    """Raise a TypeError if ``key`` cannot name a request."""
    try:
        hash(key)
    except TypeError:
        raise TypeError(f"key must be hashable, got {type(key).__name__}") from None


def _new_state(section: Section) -> State:
    config = section.config
    if isinstance(config, DBPruneConfig):
        return PruneState(config, section.calibrator_config, section.total, section.group)
    return SectionState(config, section.calibrator_config, section.tap, section.group)


def _new_run(section: Section, state: State) -> Run:
    if isinstance(state, PruneState):
        return PruneRun(section, state)
    assert isinstance(state, SectionState)
    return SectionRun(section, state)
