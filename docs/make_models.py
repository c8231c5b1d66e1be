"""Writes docs/models.md, the table of all models and pipelines that have been tried.

PYTHONPATH=tests/helpers python docs/make_models.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cachedit.models import MODELS, SEPARATE_CFG, UNCOVERED, BlockList, find_transformers
from pipelines import BUILDERS, Tiny, build

PATH = Path(__file__).with_name("models.md")
INTRODUCTION = """# Models

Written by `docs/make_models.py` from the model table (`python/cachedit/models/`) and from the small pipelines that its
rows are tried on (`tests/helpers/pipelines/`); a test fails when it is out of date. All of it works with
`cachedit.enable_cache(pipe)`; what is not here works with a `BlockAdapter`.

## What a row says

    "AuraFlowTransformer2DModel": _separate(B("joint_transformer_blocks", P1), B("single_transformer_blocks", P3)),

The transformer's block lists in calling order, each with its forward pattern, and whether they share a decision. Lists
that carry the same streams do (*linked*: a reused step skips the later lists whole). Where streams are joined or split
between two lists, each decides for itself. Blocks that call their streams otherwise than `hidden_states` and
`encoder_hidden_states` have the names in the row.

What a loop does between the calls of its blocks needs no row: what ControlNets, face adapters and per-block text add
is part of the stored residual while it falls into the body, and is added as ever after it. HunyuanDiT's long skip
connections reach from the first blocks to the last: with it, `Bn_compute_blocks` must not be larger than
`Fn_compute_blocks`.

## Guidance

*One batch*: all branches in one call. *Named*: one call per branch, inside of `cache_context(name)`. *In turn*: one
call per branch, told apart by their order; a request without guidance is known by its second timestep.

## Adding a model

1. Find the loops over block lists in the transformer's `forward`; read off the pattern from what a block takes and
   returns (README). Do the streams go on unchanged from list to list? Then they are linked.
2. Add the row to `python/cachedit/models/table.py`. If the pipeline calls its transformer once per branch without
   `cache_context`, or its transformer has another name, add it to `python/cachedit/models/pipelines.py` as well.
3. Add a builder to `tests/helpers/pipelines/`: the real pipeline with a small transformer, four blocks per list.
4. `pytest tests/cachedit/models -k NewPipeline`: nothing reusable is the baseline bit for bit; a mask does what plain
   forward hooks do; branches do not mix; requests of other sizes and lengths in between change nothing.
"""


def render() -> str:
    """The text of docs/models.md."""
    rows = [row(name, build(name)) for name in sorted(BUILDERS, key=str.lower)]
    parts = [
        INTRODUCTION,
        f"## Pipelines\n\n{len({row[0] for row in rows})} classes.\n",
        *lines(("pipeline", "variant", "transformer", "guidance"), rows),
        "\n## Transformers\n",
        *lines(("transformer", "block lists", "decisions"), sorted(transformers())),
        "\n## Not in the table\n",
        *lines(("transformer", "reason"), sorted((f"`{name}`", reason) for name, reason in UNCOVERED.items())),
    ]
    return "\n".join(parts) + "\n"


def row(name: str, tiny: Tiny) -> tuple[str, ...]:
    """One pipeline."""
    pipeline, _, variant = name.partition(" + ")
    classes = sorted({type(module).__name__ for module in find_transformers(tiny.pipe)})
    if tiny.branches > 1:
        guidance = "in turn" if pipeline in SEPARATE_CFG else "named"
    else:
        guidance = "one batch" if tiny.guided else ""
    return f"`{pipeline}`", variant, ", ".join(f"`{name}`" for name in classes), guidance


def transformers() -> Iterator[tuple[str, ...]]:
    """One row per transformer."""
    for name, entry in MODELS.items():
        blocks = [describe(item) for group in entry.sections for item in group]
        count = len(entry.sections)
        yield f"`{name}`", ", ".join(blocks), "linked" if count < len(blocks) else "separate" if count > 1 else ""


def describe(item: BlockList) -> str:
    """A block list, its pattern, and what its blocks call their streams where that is unusual."""
    usual = BlockList(item.name, item.pattern).streams
    names = [given for given, name in zip(item.streams, usual, strict=True) if given != name]
    return f"`{item.name}` {item.pattern.name[-1]}" + (f" ({', '.join(names)})" if names else "")


def lines(titles: tuple[str, ...], rows: Any) -> Iterator[str]:
    """A markdown table."""
    yield "| " + " | ".join(titles) + " |"
    yield "|" + "---|" * len(titles)
    for cells in rows:
        yield "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PATH.write_text(render())
