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
