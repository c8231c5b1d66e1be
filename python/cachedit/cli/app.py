"""Commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def cachedit() -> None:
    """Cache diffusion transformers: the same pictures, with most of the work left out."""


@app.command()
def demo(
    steps: Annotated[int, typer.Option(help="Denoising steps; 8 or more, so that named step masks exist.", min=8)] = 28,
    prompts: Annotated[
        list[str] | None, typer.Option(help="A prompt (repeat the option for more), or a number of built-in ones.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto: a GPU if there is one.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for images.png, steps.png and report.json.")] = Path("demo"),
    rounds: Annotated[int, typer.Option(help="Alternating timed runs per configuration.", min=3)] = 11,
) -> None:
    """Draw pictures with the embedded model, with and without the cache, and compare speed and quality."""
    from . import demo as command

    try:
        command.run(steps=steps, prompts=prompts, seed=seed, device=device, out=out, rounds=rounds)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[Path, typer.Argument(help="A Python script.", exists=True, dir_okay=False)],
    arguments: Annotated[list[str] | None, typer.Argument(help="What the script gets as its arguments.")] = None,
) -> None:
    """Run a script that is written for cache_dit, unchanged, on cachedit."""
    from . import script as command

    raise typer.Exit(command.run(str(script), arguments or []))


@app.command()
def models(
    filter: Annotated[str, typer.Option(help="Part of the name of a pipeline or transformer.")] = "",
) -> None:
    """List the pipelines that are supported: transformer, block lists, guidance, and whether the tests run them."""
    from . import models as command

    try:
        command.run(filter)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--filter") from error


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def metrics(context: typer.Context) -> None:
    """Compare pictures and videos with a baseline or with prompts: PSNR, SSIM, MSE, LPIPS, FID, CLIP, ImageReward."""
    from . import metrics as command

    raise typer.Exit(command.run(context.args))


@app.command()
def generate(
    model_path: Annotated[
        str, typer.Option(help="Folder of a diffusers pipeline, or its name on the hub.")
    ] = "embedded",
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw (repeat the option for more).")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    height: Annotated[int | None, typer.Option(help="In pixels.", min=1)] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.", min=1)] = None,
    num_frames: Annotated[int | None, typer.Option(help="Of a video.", min=1)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="As the pipeline understands it.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 42,
    cache_dit_config: Annotated[
        Path | None, typer.Option(help="YAML or JSON: cache, parallelism, attention. Without it: the environment.")
    ] = None,
    num_gpus: Annotated[int, typer.Option(help="Processes that share the work; without GPUs, on the CPU.")] = 1,
    warmup: Annotated[bool, typer.Option(help="Draw once before the run that is timed and written.")] = False,
    enable_torch_compile: Annotated[bool, typer.Option(help="Compile the transformers' blocks.")] = False,
    dit_cpu_offload: Annotated[bool, typer.Option(help="Keep models in the CPU's memory while they are idle.")] = False,
    compare: Annotated[bool, typer.Option(help="Draw without the cache, too, and print speed and PSNR.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: bfloat16 on GPUs.")] = "auto",
    output_path: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("outputs"),
    output_file_name: Annotated[
        str | None, typer.Option(help=".png, .jpg, .webp; .mp4 or .gif. Default: from the prompt.")
    ] = None,
    save_output: Annotated[bool, typer.Option(help="Write files.")] = True,
    fps: Annotated[int, typer.Option(help="Frames per second of videos.")] = 16,
    backend: Annotated[str, typer.Option(help="Accepted and not used.", hidden=True)] = "diffusers",
) -> None:
    """Draw with a diffusers pipeline and the cache; also with and without it, to compare."""
    from . import generate as command

    options = command.Options(
        model_path=model_path,
        prompts=prompt or [],
        seed=seed,
        call={
            "negative_prompt": negative_prompt,
            "num_inference_steps": num_inference_steps,
            "height": height,
            "width": width,
            "num_frames": num_frames,
            "guidance_scale": guidance_scale,
        },
        cache_dit_config=cache_dit_config,
        num_gpus=num_gpus,
        warmup=warmup,
        enable_torch_compile=enable_torch_compile,
        dit_cpu_offload=dit_cpu_offload,
        compare=compare,
        device=device,
        dtype=dtype,
        output_path=output_path if save_output else None,
        output_file_name=output_file_name,
        fps=fps,
    )
    try:
        command.run(options)
    except command.ProcessError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
