"""State of requests: one per image or video in the making, each with its guidance branches."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Hashable

from .blocks import Run, Section
from .body import SectionRun
from .config import DBPruneConfig
from .context import SectionState, State
from .prune import PruneRun, PruneState

__all__ = ["Branch", "Request", "Requests"]

logger = logging.getLogger(__name__)

DEFAULT = ("cachedit", "default")  # key of the request that runs outside of ``cachedit.request``


class Branch:
    """One guidance branch of a request: one state per section.

    Args:
        name: As the pipeline calls it (``cache_context(name)``), or "cond", "uncond" or "default".
        sections: The transformer's sections.
        total_steps: Steps of the request, if known.
        first: The branch that this request had first, if there is one; its differences serve here where the
            configuration says so.
    """

    def __init__(self, name: str, sections: list[Section], total_steps: int | None, first: Branch | None):
        self.name = name
        self.sections = sections
        self.states: list[State] = [_new_state(section) for section in sections]
        if first is not None:
            for state, other in zip(self.states, first.states, strict=True):
                if isinstance(state, SectionState) and not state.config.cfg_diff_compute_separate:
                    state.borrows_from = other if isinstance(other, SectionState) else None
        self.begin(total_steps)

    @property
    def step(self) -> int:
        """Steps of this request that are done."""
        return self.states[0].policy.step

    @property
    def bytes_held(self) -> int:
        """Bytes of all buffers."""
        return sum(state.bytes_held for state in self.states)

    def begin(self, total_steps: int | None) -> None:
        """Start a request."""
        self.grid: tuple[int, ...] | None = None  # of tokens, for SeaCache
        for state in self.states:
            state.begin(total_steps)

    def rewind(self, step: int) -> None:
        """Go back to the start of a step that failed, with nothing stored."""
        for state in self.states:
            state.rewind(step)

    def runs(self) -> list[Run]:
        """What the lists hand out during one forward."""
        return [_new_run(section, state) for section, state in zip(self.sections, self.states, strict=True)]


class Request:
    """State of one request.

    Args:
        total_steps: Denoising steps, if known.
        ends: Whether a forward after the last step begins the next request.
    """

    def __init__(self, total_steps: int | None, ends: bool):
        self.branches: dict[str, Branch] = {}
        self.owner: int | None = None  # thread that runs a forward
        self.begin(total_steps, ends)

    def begin(self, total_steps: int | None, ends: bool) -> None:
        """Start afresh: nothing of what was before is reused; buffers stay."""
        self.total_steps = total_steps
        self.ends = ends
        self.calls = 0  # forwards, over all branches
        for branch in self.branches.values():
            branch.begin(total_steps)

    @property
    def bytes_held(self) -> int:
        """Bytes of all buffers."""
        return sum(branch.bytes_held for branch in self.branches.values())

    def branch(self, name: str, sections: list[Section]) -> Branch:
        """The branch that a call belongs to."""
        branch = self.branches.get(name)
        if branch is None:
            first = next(iter(self.branches.values()), None)
            branch = self.branches[name] = Branch(name, sections, self.total_steps, first)
        elif self.ends and self.total_steps is not None and branch.step >= self.total_steps:
            self.begin(self.total_steps, self.ends)
        return branch

    def release(self) -> None:
        """Drop the buffers; which step each branch is at is kept."""
        for branch in self.branches.values():
            for state in branch.states:
                state.release()

    def enter(self) -> int | None:
        """A forward begins. Two at a time on one request would mix up its steps. Returns what to give to ``leave``.

        Raises:
            RuntimeError: If another thread is in a forward of this request.
        """
        thread = threading.get_ident()
        outer = self.owner
        if outer is not None and outer != thread:
            raise RuntimeError(
                "two threads run one request of a cached transformer at the same time; give each its own state: "
                "with cachedit.request(transformer, key): ..."
            )
        self.owner = thread
        return outer

    def leave(self, outer: int | None) -> None:
        """The forward has ended."""
        self.owner = outer


class Requests:
    """All requests of one transformer, the least recently used one first.

    Args:
        max_requests: Keep at most so many besides the default one; the least recently used is dropped.
        max_bytes: Let the least recently used requests drop their buffers, and compute their next step, once all
            requests together hold more. None: no limit.
    """

    def __init__(self, max_requests: int = 256, max_bytes: int | None = None):
        self.by_key: OrderedDict[Hashable, Request] = OrderedDict()
        self._warned = False
        self.limit(max_requests, max_bytes)

    def limit(self, max_requests: int, max_bytes: int | None) -> None:
        """Set the limits; they hold from the next forward on."""
        self.max_requests = max_requests
        self.max_bytes = max_bytes

    def get(self, key: Hashable, total_steps: int | None, ends: bool) -> Request:
        """The request of this key, new if there is none."""
        request = self.by_key.get(key)
        if request is None:
            request = self.by_key[key] = Request(total_steps, ends)
            self._limit_count(request)
        self.by_key.move_to_end(key)
        return request

    def drop(self, key: Hashable) -> None:
        """Drop a request and its buffers, if it is there."""
        self.by_key.pop(key, None)

    def clear(self) -> None:
        """Drop all."""
        self.by_key.clear()

    @property
    def latest(self) -> Request | None:
        """The request that ran last."""
        return next((request for request in reversed(self.by_key.values()) if request.branches), None)

    def limit_bytes(self, running: Request) -> None:
        """Have the least recently used requests drop their buffers until the limit holds."""
        if self.max_bytes is None:
            return
        held = {key: request.bytes_held for key, request in list(self.by_key.items())}
        total = sum(held.values())
        for key, size in held.items():
            request = self.by_key.get(key)
            if total <= self.max_bytes:
                return
            if request is not None and request is not running and request.owner is None and size:
                request.release()
                total -= size

    def _limit_count(self, new: Request) -> None:
        keyed = [key for key in self.by_key if key is not DEFAULT]
        for key in keyed[: max(len(keyed) - self.max_requests, 0)]:
            if self.by_key[key] is not new and self.by_key[key].owner is None:
                self.drop(key)
                if not self._warned:
                    self._warned = True
                    logger.warning(
                        "more than %d requests at a time on one transformer: the least recently used are dropped and "
                        "start over; end requests with cachedit.drop_request, or raise the limit",
                        self.max_requests,
                    )


def _new_state(section: Section) -> State:
    config = section.config
    if isinstance(config, DBPruneConfig):
        return PruneState(config, section.calibrator_config, section.total)
    return SectionState(config, section.calibrator_config, section.tap)


def _new_run(section: Section, state: State) -> Run:
    if isinstance(state, PruneState):
        return PruneRun(section, state)
    assert isinstance(state, SectionState)
    return SectionRun(section, state)
