"""Shares the tiles of a VAE out over the ranks of a group.

diffusers' VAEs cut what is too large into overlapping tiles, call their encoder or decoder for each (causal video VAEs
several times per tile, for a chunk of frames each), and blend neighbouring results. That loop stays theirs. It runs
three times, with another stand-in for the ``forward`` of the encoder or decoder, here called the coder:

    plan      all on the meta device: which calls there will be, which of them make up a tile, what they return
    compute   the calls of this rank's tiles are computed; every call returns zeros, which nothing reads
    replay    every call returns what its rank has computed, and the loop blends

Between the last two all results are gathered, in one collective. Blending is thereby exact by construction.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .groups import all_gather

__all__ = ["SUPPORTED", "Handle", "check_tiles", "share_tiles"]

# Classes of diffusers whose shared results are proved equal. docs/parallel-vae.md says why others are left out.
SUPPORTED = (
    "AutoencoderDC",
    "AutoencoderKL",
    "AutoencoderKLAllegro",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanImage",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLHunyuanVideo15",
    "AutoencoderKLKVAE",
    "AutoencoderKLLTX2Video",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLMiniMaxH3",
    "AutoencoderKLMochi",
    "AutoencoderKLQwenImage",
    "AutoencoderKLQwenImage21",
    "AutoencoderKLWan",
    "AutoencoderOobleck",
    "AutoencoderTiny",
)
PLANS = 64  # that are kept: sizes of pictures and videos that a server meets
CODERS = {"encode": "encoder", "decode": "decoder"}
ABSENT: Any = object()  # in place of the value of an attribute that an object doesn't have


class Handle:
    """What :func:`share_tiles` has changed.

    Args:
        vae: The VAE, changed.
        before: Its ``vars()`` as they were.
    """

    def __init__(self, vae: nn.Module, before: Mapping[str, Any]):
        self.vae = vae
        old = {name: before.get(name, ABSENT) for name in vars(vae)}
        self.changed = {name: value for name, value in old.items() if value is not vars(vae)[name]}

    def undo(self) -> None:
        """Put everything back; a second call does nothing."""
        _set(self.vae, self.changed)
        self.changed = {}


def share_tiles(vae: nn.Module, group: dist.ProcessGroup | None = None, **tile_sizes: float) -> Handle:
    """Let the ranks of a group compute the tiles of ``vae.encode`` and ``vae.decode`` together.

    Every rank must then call the two alike, with equal tensors, and gets the whole result, equal in every bit to what
    one process computes with the same tiles. One collective per call; none where there is one tile only, which every
    rank computes. For inference: what was shared has no gradient.

    Args:
        vae: One of :data:`SUPPORTED`. Only this instance is changed; its tiling is switched on if it is off.
        group: Whose ranks take part; all by default.
        tile_sizes: In pixels and frames, under the names that ``vae.enable_tiling`` takes. Where it takes none, those
            of the VAE's attributes: ``tile_sample_min_size``, and ``tile_latent_min_size`` follows. By default, as set.

    Raises:
        ValueError: If the class, a size's name or the group does not fit, if the decoder draws noise (then ranks would
            draw different noise), or if tiles are shared already. Nothing is changed then.
    """
    check_tiles(vae, group)
    options, attributes = _check_sizes(vae, tile_sizes)
    before = dict(vars(vae))
    vae.enable_tiling(**options)  # type: ignore[operator]
    _set(vae, attributes)
    if dist.get_world_size(group) > 1:
        for method, coder in CODERS.items():
            setattr(vae, method, SharedMethod(vae, getattr(vae, method), coder, group))
    return Handle(vae, before)


def check_tiles(vae: Any, group: dist.ProcessGroup | None) -> None:
    """Whether the tiles of a VAE can be shared out. Changes nothing.

    Raises:
        ValueError: See :func:`share_tiles`.
    """
    name = type(vae).__name__
    if not any(base.__name__ in SUPPORTED for base in type(vae).__mro__):
        raise ValueError(f"vae must be one of {', '.join(SUPPORTED)}, got {name}")
    if any(isinstance(vars(vae).get(method), SharedMethod) for method in CODERS):
        raise ValueError(f"vae: the tiles of this {name} are shared already; undo that first")
    for coder in CODERS.values():
        _check_hooks(getattr(vae, coder))
    noise = vae.config.get("decoder_inject_noise", False)
    if any(noise) if isinstance(noise, Sequence) else noise:
        raise ValueError(f"vae: this {name}'s decoder draws noise (decoder_inject_noise), which ranks can't share")
    if dist.get_rank(group) < 0:
        raise ValueError("group must contain this rank")


def _check_hooks(coder: nn.Module) -> None:
    """Hooks that replace weights would meet the plan's, which are on the meta device."""
    for module in coder.modules():
        if hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook"):
            raise ValueError(
                f"vae: offloading or casting by hooks inside of {type(coder).__name__} can't be combined with sharing "
                "tiles; enable_model_cpu_offload can"
            )


def _check_sizes(vae: Any, sizes: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """The sizes, split into arguments of ``enable_tiling`` and values of attributes."""
    options = inspect.signature(vae.enable_tiling).parameters
    names = list(options) or [name for name in ("tile_sample_min_size", "tile_overlap_factor") if hasattr(vae, name)]
    for name in sizes:
        if name not in names:
            raise ValueError(f"{type(vae).__name__} has the tile sizes {', '.join(names) or 'none'}, got {name}")
    if options:
        return dict(sizes), {}
    attributes = dict(sizes)
    if "tile_sample_min_size" in sizes:
        attributes["tile_latent_min_size"] = (
            int(sizes["tile_sample_min_size"]) * vae.tile_latent_min_size // vae.tile_sample_min_size
        )
    return {}, attributes


class Call(NamedTuple):
    """One call of the coder."""

    tile: int
    cost: int  # elements of its input
    shape: torch.Size  # of what it returns, as are the next three
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    with_cache: bool  # it returns features for the tile's next call, too


class SharedMethod:
    """``vae.encode`` or ``vae.decode``, with the calls of the coder shared out.

    Args:
        vae: The VAE.
        method: Its method.
        coder: The coder's name.
        group: Whose ranks take part, two or more.
    """

    def __init__(self, vae: nn.Module, method: Callable[..., Any], coder: str, group: dist.ProcessGroup | None):
        functools.update_wrapper(self, method)
        self.vae = vae
        self.method = method
        self.coder = coder
        self.group = group
        self.plans: dict[Hashable, list[Call]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        coder = getattr(self.vae, self.coder)
        key = _signature(self.vae, coder, args, kwargs)
        if key not in self.plans:
            if len(self.plans) == PLANS:
                self.plans.clear()
            self.plans[key] = self._plan(coder, args, kwargs)
        calls = self.plans[key]
        if calls[-1].tile == 0:
            return self.method(*args, **kwargs)
        owners = _balance(calls, dist.get_world_size(self.group))
        with torch.no_grad():
            mine = self._compute(coder, calls, owners, args, kwargs)
            results = _gather(mine, calls, owners, self.group)
            replay = map(_returned, calls, results)
            with _replaced(coder, forward=lambda *args, **kwargs: next(replay)):
                return self.method(*args, **kwargs)

    def _plan(self, coder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
        """The calls to come.

        A call belongs to its predecessor's tile if it is handed the predecessor's features. These are of a fixed
        number of frames, so that the shape of a result depends on that of the input and on whether there are features.
        """
        _check_hooks(coder)
        device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if torch.is_autocast_enabled(device.type):
            raise RuntimeError(f"{self.coder}: tiles can't be shared under autocast, whose dtypes can't be planned")
        calls: list[Call] = []
        known: dict[tuple[torch.Size, bool], Any] = {}
        forward = coder.forward
        last_features: Any = None

        def plan(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal last_features
            features = kwargs.get("feat_cache")  # a list, filled in place; a new one for each tile
            continues = kwargs.get("conv_cache") is not None or (features is not None and features is last_features)
            last_features = features
            if (x.shape, continues) not in known:
                known[x.shape, continues] = forward(x, *args, **kwargs)
            returned = known[x.shape, continues]
            result = returned[0] if isinstance(returned, tuple) else returned
            tile = calls[-1].tile + (not continues) if calls else 0
            like = result.shape, result.stride(), result.dtype, device
            calls.append(Call(tile, x.numel(), *like, with_cache=result is not returned))
            return returned

        hook = vars(self.vae).get("_hf_hook")
        if hook is not None:
            hook.pre_forward(self.vae)  # of enable_model_cpu_offload: loads the weights, for which see _check_hooks
        caller = Caller(self.vae, self.method)
        weights = {
            name: weight.to("meta")
            for name, weight in itertools.chain(caller.named_parameters(), caller.named_buffers())
        }
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        with (
            torch.no_grad(),
            Unnormalized(),
            torch.compiler.set_stance("force_eager"),
            _replaced(self.vae, _hf_hook=None),
            self._unblended(coder, plan),
        ):
            functional_call(caller, weights, args, kwargs)
        return calls

    def _compute(
        self,
        coder: nn.Module,
        calls: Sequence[Call],
        owners: Sequence[int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Tensor]:
        """What this rank's calls return, in their order."""
        rank = dist.get_rank(self.group)
        results: list[Tensor] = []
        forward = coder.forward
        coming = zip(calls, owners, strict=True)

        def compute(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            call, owner = next(coming)
            cache = None
            if owner == rank:
                result = forward(x, *args, **kwargs)
                result, cache = result if call.with_cache else (result, None)
                if (result.shape, result.dtype) != (call.shape, call.dtype):
                    raise RuntimeError(
                        f"{self.coder} of {type(self.vae).__name__} was to return {call.dtype} {tuple(call.shape)}, "
                        f"got {result.dtype} {tuple(result.shape)}"
                    )
                results.append(result)
            zeros = torch.zeros((), dtype=call.dtype, device=call.device).expand(call.shape)
            return _returned(call, zeros, cache)

        with self._unblended(coder, compute):
            self.method(*args, **kwargs)
        return results

    @contextmanager
    def _unblended(self, coder: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
        """Inside, ``coder`` has this ``forward``, and most VAEs' loops don't blend."""

        def unblended(above_or_left: Tensor, tile: Tensor, extent: int) -> Tensor:
            return tile

        blends = {name: unblended for name in ("blend_v", "blend_h", "blend_t") if hasattr(self.vae, name)}
        with _replaced(coder, forward=forward), _replaced(self.vae, **blends):
            yield


class Caller(nn.Module):
    """A method of a module in the form that ``functional_call`` takes."""

    def __init__(self, vae: nn.Module, method: Callable[..., Any]):
        super().__init__()
        self.vae = vae
        self.method = method

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.method(*args, **kwargs)


class Unnormalized(TorchFunctionMode):
    """Leaves out norms, which change no shape, and on the meta device take longer than all the rest."""

    NORMS = nn.functional.group_norm, nn.functional.layer_norm, nn.functional.normalize

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in self.NORMS else func(*args, **(kwargs or {}))


def _signature(vae: nn.Module, coder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """All that the plan depends on."""
    inputs = [
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device, torch.is_autocast_enabled(leaf.device.type))
        if isinstance(leaf, Tensor)
        else repr(leaf)
        for leaf in tree_leaves((args, sorted(kwargs.items())))
    ]
    settings = [(name, value) for name, value in vars(vae).items() if isinstance(value, int | float | tuple)]
    weights = [(weight.dtype, weight.stride()) for weight in coder.parameters()]
    return tuple(inputs), tuple(settings), tuple(weights)


def _balance(calls: Sequence[Call], world: int) -> list[int]:
    """The rank of each call: largest tile first, each to the rank with the least to do (Graham's LPT rule, 1969)."""
    costs = [0] * (calls[-1].tile + 1)
    for call in calls:
        costs[call.tile] += call.cost
    loads, owners = [0] * world, [0] * len(costs)
    for tile in sorted(range(len(costs)), key=lambda tile: -costs[tile]):
        owners[tile] = loads.index(min(loads))
        loads[owners[tile]] += costs[tile]
    return [owners[call.tile] for call in calls]


def _returned(call: Call, result: Tensor, cache: Any = None) -> Any:
    return (result, cache) if call.with_cache else result


def _gather(
    mine: Sequence[Tensor], calls: Sequence[Call], owners: Sequence[int], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """What all calls return, in their order: one collective, padded to what the busiest rank sends."""
    sizes = [0] * dist.get_world_size(group)
    starts = []
    for call, owner in zip(calls, owners, strict=True):
        starts.append(sizes[owner])
        sizes[owner] += call.shape.numel()
    sent = torch.zeros(max(sizes), dtype=calls[0].dtype, device=calls[0].device)
    if mine:
        flat = [result.flatten() for result in mine]
        torch.cat(flat, out=sent[: sum(map(torch.numel, flat))])
    received = sent.new_empty(len(sizes), max(sizes))
    # As bytes, since not every backend knows every dtype.
    all_gather(received.view(torch.uint8).flatten(), sent.view(torch.uint8), group=group)
    # Copied out, laid out and aligned as the coder would have it: convolutions that follow could round otherwise.
    return [
        torch.empty_strided(call.shape, call.stride, dtype=call.dtype, device=call.device).copy_(
            received[owner, start : start + call.shape.numel()].view(call.shape)
        )
        for call, owner, start in zip(calls, owners, starts, strict=True)
    ]


@contextmanager
def _replaced(module: nn.Module, **values: Any) -> Iterator[None]:
    """Inside, the module has these attributes of its own."""
    before = {name: vars(module).get(name, ABSENT) for name in values}
    _set(module, values)
    try:
        yield
    finally:
        _set(module, before)


def _set(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Give the module attributes, or take those that are to be absent."""
    for name, value in values.items():
        if value is ABSENT:
            delattr(module, name)
        else:
            setattr(module, name, value)
