"""What a user says about parallelism: sizes, and how sequences travel."""

from __future__ import annotations

import dataclasses
import logging
import math
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["ParallelismBackend", "ParallelismConfig", "Sizes"]

logger = logging.getLogger(__name__)

ROTATE_METHODS = ("p2p", "allgather")
_SIZES = ("ulysses_size", "ring_size", "tp_size")
_SWITCHES = ("ulysses_anything", "ulysses_float8", "ulysses_async", "ring_convert_to_fp32")
_OLD_NAMES = {f"experimental_{name}": name for name in ("ulysses_anything", "ulysses_float8", "ulysses_async")}


class ParallelismBackend(str, Enum):
    """As ``cache_dit`` calls its implementations of parallelism; here there is one for all."""

    AUTO = "Auto"
    CACHE_DIT = "CACHE_DIT"
    NATIVE_DIFFUSER = "Native_Diffuser"
    NATIVE_PYTORCH = "Native_PyTorch"
    NATIVE_HYBRID = "Native_Hybrid"
    NONE = "None"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many ranks work along each dimension; a rank's number is ``(ring * ulysses + u) * tp + t``."""

    ring: int
    ulysses: int
    tp: int

    @property
    def sequence(self) -> int:
        """Into how many pieces the sequence is cut."""
        return self.ring * self.ulysses

    @property
    def total(self) -> int:
        return self.sequence * self.tp


@dataclasses.dataclass
class ParallelismConfig:
    """How the work of one denoising step is shared among ranks.

    Sequence parallelism cuts the tokens into ``ulysses_size * ring_size`` pieces. Ulysses (arXiv 2309.14509) swaps
    them for heads around each attention; ring attention (2310.01889) passes keys and values around; both together are
    USP (2405.07719). Tensor parallelism cuts the weights into ``tp_size`` shards. The product of all sizes must be the
    number of ranks.

    Args:
        backend: A :class:`ParallelismBackend` or its name; without effect.
        ulysses_size: Ranks that swap heads for tokens; an integer, ``"auto"`` (what the other sizes leave), or None
            for 1. At most one size may be ``"auto"``.
        ring_size: Ranks that keys and values go around.
        tp_size: Ranks that weights are cut for.
        use_ray: Must be False: launch with torchrun.
        cp_plan: Where tensors are split and gathered, in the form of diffusers' ``_cp_plan``. Default: the model's
            own, or our row for it.
        attention_backend: Name of a diffusers attention backend for the attention on each rank. Default: as set.
        ulysses_anything: Without effect: any sequence length and any number of heads always works, unpadded.
        ulysses_float8: Send Q, V and attention's result in E4M3, with a float32 scale per token and head; K, to which
            the softmax is sensitive, stays as it is.
        ulysses_async: Send V, Q and K one by one, each while the next is projected, and attention's result while what
            does not need it is computed: 4 collectives a layer instead of 2, hidden behind work, and the same result.
            For FLUX, FLUX.2, Qwen-Image, Z-Image, Ovis-Image, LongCat-Image and Wan; without effect where
            ``ulysses_size`` is 1.
        extra_parallel_kwargs: Accepted and not used.
        ring_rotate_method: ``"p2p"``: keys and values are passed on while attention is computed on those at hand;
            ``"allgather"``: all are fetched beforehand.
        ring_convert_to_fp32: Keep ring attention's running result in float32.
        extra_parallel_modules: More modules of the pipeline to share out, as names or modules: text encoders (by
            tensor parallelism), VAEs (tile by tile), ControlNets (like the transformer).
        parallel_kwargs: Deprecated: other fields by name, also under their older ``experimental_`` names.
        process_group: The ranks that take part. Default: all.

    Raises:
        ValueError, TypeError: From ``validate``, which ``enable_cache`` calls on every rank.
    """

    backend: ParallelismBackend | str = ParallelismBackend.AUTO
    ulysses_size: int | str | None = None
    ring_size: int | str | None = None
    tp_size: int | str | None = None
    use_ray: bool = False
    cp_plan: dict[str, Any] | None = None
    attention_backend: str | None = None
    ulysses_anything: bool = False
    ulysses_float8: bool = False
    ulysses_async: bool = False
    extra_parallel_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    ring_rotate_method: str = "p2p"
    ring_convert_to_fp32: bool = True
    extra_parallel_modules: list[str | nn.Module] = dataclasses.field(default_factory=list)
    parallel_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    process_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self) if field.name != "parallel_kwargs"]
        if not isinstance(self.parallel_kwargs or {}, dict):
            raise TypeError(f"parallel_kwargs must be a dict, got {self.parallel_kwargs!r}")
        for key, value in (self.parallel_kwargs or {}).items():
            name = _OLD_NAMES.get(key, key)
            if name not in names:
                raise ValueError(f"parallel_kwargs: {key} is none of {', '.join([*names, *_OLD_NAMES])}")
            logger.warning("%s in parallel_kwargs is deprecated, use ParallelismConfig(%s=...)", key, name)
            setattr(self, name, value)
        self.parallel_kwargs = {}

    def validate(self) -> None:
        """Check every field by itself, without regard to the number of ranks."""
        if self.use_ray:
            raise ValueError("use_ray must be False: there is no Ray launcher here, use torchrun")
        backends = [backend.value for backend in ParallelismBackend]
        if str(getattr(self.backend, "value", self.backend)).lower() not in map(str.lower, backends):
            raise ValueError(f"backend must be one of {', '.join(backends)}, got {self.backend!r}")
        for name in _SIZES:
            size = getattr(self, name)
            if size is not None and size != "auto" and (type(size) is not int or size < 1):
                raise ValueError(f'{name} must be an integer of at least 1 or "auto", got {size!r}')
        if sum(getattr(self, name) == "auto" for name in _SIZES) > 1:
            raise ValueError(f'at most one of {", ".join(_SIZES)} may be "auto"')
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, kind in (("cp_plan", dict), ("extra_parallel_kwargs", dict), ("attention_backend", str)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}")
        if self.ring_rotate_method not in ROTATE_METHODS:
            raise ValueError(
                f"ring_rotate_method must be one of {', '.join(ROTATE_METHODS)}, got {self.ring_rotate_method!r}"
            )
        if not isinstance(self.extra_parallel_modules, (list, tuple)):
            raise TypeError(f"extra_parallel_modules must be a list of names or modules, got "
                            f"{type(self.extra_parallel_modules).__name__}")  # fmt: skip
        for module in self.extra_parallel_modules:
            if not isinstance(module, (str, nn.Module)):
                raise TypeError(f"extra_parallel_modules must be names or modules, got {type(module).__name__}")

    def sizes(self, world: int) -> Sizes:
        """Work out the sizes on ``world`` ranks.

        Raises:
            ValueError: If their product is not ``world``, or nothing would be shared.
        """
        given = {name: getattr(self, name) for name in _SIZES}
        known = math.prod(size for size in given.values() if isinstance(size, int))
        for name, size in given.items():
            if size == "auto":
                given[name] = max(world // known, 1)
        values = {name: 1 if size is None else size for name, size in given.items()}
        if math.prod(values.values()) != world:
            raise ValueError(
                f"{' x '.join(_SIZES)} = {' x '.join(str(size) for size in values.values())} must be the number of "
                f"ranks, {world}"
            )
        if world == 1:
            raise ValueError(f"{', '.join(_SIZES)}: nothing to share out on one rank; launch several with torchrun")
        return Sizes(values["ring_size"], values["ulysses_size"], values["tp_size"])

    def enabled(self) -> bool:
        """Whether any size is larger than one (or ``"auto"``)."""
        return self.cp_enabled() or self.tp_enabled()

    def cp_enabled(self) -> bool:
        """Whether sequences are split."""
        return _several(self.ulysses_size) or _several(self.ring_size)

    def tp_enabled(self) -> bool:
        """Whether weights are."""
        return _several(self.tp_size)

    def usp_enabled(self) -> bool:
        """Whether sequences are split for Ulysses and for a ring."""
        return _several(self.ulysses_size) and _several(self.ring_size)

    def hybrid_enabled(self) -> bool:
        """Whether sequences and weights are split."""
        return self.cp_enabled() and self.tp_enabled()

    def as_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def update(self, **changes: Any) -> ParallelismConfig:
        """Set fields in place; None changes nothing. Unknown names are a TypeError."""
        names = self.as_dict()
        for name, value in changes.items():
            if name not in names:
                raise TypeError(f"ParallelismConfig has no field {name!r}")
            if value is not None:
                setattr(self, name, value)
        return self

    def strify(self, details: bool = False) -> str:
        """A short tag such as ``Ulysses2_F8_TP2``; with ``details``, the fields that are set."""
        if details:
            default = ParallelismConfig()
            fields = {name: value for name, value in self.as_dict().items() if value != getattr(default, name)}
            return f"ParallelismConfig({', '.join(f'{name}={value!r}' for name, value in fields.items())})"
        parts = [
            f"{label}{size}"
            for label, size in (("Ulysses", self.ulysses_size), ("Ring", self.ring_size), ("TP", self.tp_size))
            if size is not None
        ]
        if self.ulysses_float8:
            parts.insert(1, "F8")
        return "_".join(parts) or "NONE"


def _several(size: int | str | None) -> bool:
    return size not in (None, 1)
