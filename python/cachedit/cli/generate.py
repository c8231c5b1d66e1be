"""``cachedit generate``: a diffusers pipeline from the shell, with the cache, on one process or several."""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import cachedit
from cachedit.attention import transformers_of
from cachedit.embedded import EmbeddedPipeline, load_pipeline
from cachedit.load import load_configs
from cachedit.metrics import compute_psnr, compute_ssim
from cachedit.metrics.compare import mean
from cachedit.parallel import ParallelismConfig

from .environment import cache_from_environment
from .output import Drawn, check_name, drawn, name_of, write

EMBEDDED = "embedded"
PROMPT = "a red circle left of a blue square"  # for the embedded model
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """The command's options; ``call`` holds what goes to the pipeline as it is, None where not given."""

    model_path: str = EMBEDDED
    prompts: list[str] = field(default_factory=list)
    seed: int = 42
    call: dict[str, Any] = field(default_factory=dict)
    cache_dit_config: Path | None = None
    num_gpus: int = 1
    warmup: bool = False
    enable_torch_compile: bool = False
    dit_cpu_offload: bool = False
    compare: bool = False
    device: str = "auto"
    dtype: str = "auto"
    output_path: Path | None = Path("outputs")
    output_file_name: str | None = None
    fps: int = 16


class ProcessError(RuntimeError):
    """One of the processes of ``--num-gpus`` has failed; the message is what it raised."""


@dataclass(frozen=True)
class Settings:
    """What files and the environment say: ``base`` goes to ``enable_cache`` with and without the cache."""

    cache: Any = None
    calibrator: Any = None
    base: dict[str, Any] = field(default_factory=dict)


def run(options: Options) -> None:
    """Check the options, draw, write files and print what it took.

    Raises:
        ValueError, OSError, ImportError: For options that cannot be used; most before anything is loaded.
        ProcessError: If one of several processes fails.
    """
    _check(options)
    settings = _settings(options)
    if options.num_gpus == 1:
        _work(options, settings, rank=0, local_rank=0)
    else:
        _launch(options)


def _check(options: Options) -> None:
    if not options.prompts and options.model_path != EMBEDDED:
        raise ValueError("--prompt is needed")
    if options.dtype not in ("auto", *DTYPES):
        raise ValueError(f"--dtype must be one of auto, {', '.join(DTYPES)}, got {options.dtype}")
    for name, value in {"--num-gpus": options.num_gpus, "--fps": options.fps}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if options.num_gpus > 1 and ":" in options.device:
        raise ValueError(f"--device {options.device} is one device, but --num-gpus is {options.num_gpus}")
    kind = torch.device(_device(options, 0)).type
    if kind == "cuda" and options.num_gpus > torch.cuda.device_count():
        raise ValueError(f"--num-gpus {options.num_gpus}: this machine has {torch.cuda.device_count()}")
    if options.dit_cpu_offload and kind == "cpu":
        raise ValueError("--dit-cpu-offload needs a GPU to offload from")
    _find_model(options.model_path)


def _device(options: Options, local_rank: int) -> str:
    if options.device != "auto":
        try:
            torch.empty(1, device=options.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--device {options.device} cannot be used here: {reason}") from error
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    return f"cuda:{local_rank}" if kind == "cuda" else kind


def _find_model(model_path: str) -> str | None:
    """The class in a local folder's model_index.json; None for the embedded model and for a name on the hub."""
    index = Path(model_path).expanduser() / "model_index.json"
    if model_path == EMBEDDED:
        return None
    if index.is_file():
        return str(json.loads(index.read_text(encoding="utf-8")).get("_class_name"))
    if index.parent.exists():
        raise ValueError(f"--model-path: {model_path} is no diffusers pipeline: it has no model_index.json")
    if model_path.count("/") != 1 or model_path.startswith((".", "~", "/")):
        raise ValueError(
            f"--model-path: there is no folder {model_path}, and it is not a name on the hub (owner/model)"
        )
    return None


def _settings(options: Options) -> Settings:
    steps = options.call.get("num_inference_steps")
    if options.cache_dit_config is None:
        cache, calibrator = cache_from_environment(os.environ, steps)
        loaded: dict[str, Any] = {}
    else:
        loaded = load_configs(options.cache_dit_config)
        cache, calibrator = loaded["cache_config"], loaded["calibrator_config"]
    parallelism = loaded.get("parallelism_config")
    if options.num_gpus > 1:
        parallelism = parallelism or ParallelismConfig(ulysses_size="auto")
        parallelism.validate()
        parallelism.sizes(options.num_gpus)
    elif parallelism is not None:
        raise ValueError(f"{options.cache_dit_config}: parallelism_config needs --num-gpus of 2 or more")
    if options.compare and cache is None:
        raise ValueError("--compare needs a cache to compare with: none is enabled by the file or the environment")
    base = {"parallelism_config": parallelism}
    base |= {name: loaded.get(name) for name in ("attention_backend", "quantize_config")}
    return Settings(cache, calibrator, {name: value for name, value in base.items() if value is not None})


def _launch(options: Options) -> None:
    """Run :func:`_rank` in processes of torch.distributed's launcher, all on this machine."""
    # As torchrun does it, but not less than what each process's share of the cores is.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.num_gpus)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=options.num_gpus,
        run_id="cachedit-generate",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the exception says it all
    try:
        elastic_launch(config, _rank)(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message: Any = failure.message
        text = message["message"] if isinstance(message, dict) else message
        raise ProcessError(f"process {rank} of {options.num_gpus}: {text}") from None


@record  # writes down what it raises, for _launch
def _rank(options: Options) -> None:
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = _device(options, local_rank)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(minutes=10))
    try:
        _work(options, _settings(options), rank, local_rank)
    finally:
        dist.destroy_process_group()


def _work(options: Options, settings: Settings, rank: int, local_rank: int) -> None:
    console = Console(quiet=rank != 0, soft_wrap=True, highlight=False)
    device = _device(options, local_rank)
    pipe = _load(options, device)
    pipe.set_progress_bar_config(disable=rank != 0)
    arguments = _arguments(pipe, options)
    name = options.output_file_name or name_of((options.prompts or [PROMPT])[0])
    if options.output_path is not None:
        check_name(name, videos="num_frames" in inspect.signature(type(pipe).__call__).parameters)
    if options.compare:  # what cannot be enabled is found before minutes of drawing without it
        cachedit.enable_cache(pipe, settings.cache, settings.calibrator)
        cachedit.disable_cache(pipe)
    if settings.base:
        cachedit.enable_cache(pipe, **settings.base)
    if options.enable_torch_compile:
        _compile(pipe)

    def timed(warmup: bool) -> tuple[Drawn, float]:
        for _ in range(warmup):
            pipe(**arguments, generator=torch.Generator().manual_seed(options.seed))
        _synchronize(device)
        start = time.perf_counter()
        output = pipe(**arguments, generator=torch.Generator().manual_seed(options.seed))
        _synchronize(device)
        return drawn(output), time.perf_counter() - start

    plain = timed(warmup=True) if options.compare else None
    if settings.cache is not None:
        parallelism = {name: value for name, value in settings.base.items() if name == "parallelism_config"}
        cachedit.enable_cache(pipe, settings.cache, settings.calibrator, **parallelism)
    result, seconds = timed(warmup=options.warmup or options.compare)
    if rank != 0:
        return
    if settings.cache is not None:
        cachedit.summary(pipe)
    if plain is not None:
        console.print(_comparison(plain, (result, seconds)))
    written = write(result, options.output_path, name, options.fps) if options.output_path else []
    if plain is not None and options.output_path:
        path = Path(name)
        written += write(plain[0], options.output_path, f"{path.stem}-plain{path.suffix}", options.fps)
    console.print(f"{seconds:.3f} s" + (f", wrote {' and '.join(map(str, written))}" if written else ""))


def _load(options: Options, device: str) -> Any:
    from diffusers import DiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading
    dtype = DTYPES.get(options.dtype, torch.float32 if device == "cpu" else torch.bfloat16)
    if options.model_path == EMBEDDED or _find_model(options.model_path) == EmbeddedPipeline.__name__:
        pipe: Any = load_pipeline(dtype=dtype, path=None if options.model_path == EMBEDDED else options.model_path)
    else:
        try:
            pipe = DiffusionPipeline.from_pretrained(Path(options.model_path).expanduser().as_posix(), dtype=dtype)
        except OSError as error:
            raise ValueError(f"--model-path {options.model_path} cannot be loaded: {error}") from error
    if options.dit_cpu_offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def _compile(pipe: Any) -> None:
    for transformer in transformers_of(pipe):
        if getattr(transformer, "_repeated_blocks", None):  # the model's list of classes worth compiling
            transformer.compile_repeated_blocks()
        else:
            transformer.compile()


def _arguments(pipe: Any, options: Options) -> dict[str, Any]:
    prompts = options.prompts or [PROMPT]
    given = {name: value for name, value in options.call.items() if value is not None}
    known = inspect.signature(type(pipe).__call__).parameters
    for name in given:
        if name not in known:
            raise ValueError(f"--{name.replace('_', '-')}: {type(pipe).__name__} takes no {name}")
    return {"prompt": prompts[0] if len(prompts) == 1 else prompts, **given}


def _comparison(plain: tuple[Drawn, float], cached: tuple[Drawn, float]) -> Table:
    """Speed, and how close the pictures are."""

    def frames() -> Iterator[tuple[Any, Any]]:
        for a, b in zip(plain[0].items, cached[0].items, strict=True):
            yield from zip(a, b, strict=True)

    psnr, ssim = (mean([compute(a, b)[0] for a, b in frames()]) for compute in (compute_psnr, compute_ssim))
    table = Table(box=SIMPLE)
    for title in ("", "seconds", "speed", "PSNR dB", "SSIM"):
        table.add_column(title, justify="right" if title else "left")
    table.add_row("plain", f"{plain[1]:.3f}", "1.00x", "", "")
    table.add_row("cached", f"{cached[1]:.3f}", f"{plain[1] / cached[1]:.2f}x", _decibels(psnr), f"{ssim:.4f}")
    return table


def _decibels(value: float) -> str:
    return "same" if math.isinf(value) else f"{value:.2f}"


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
