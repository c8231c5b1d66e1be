"""Writes docs/models.md, the support matrix.

python docs/make_models.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import diffusers

from cachedit.models import MODELS, UNCOVERED, matrix_rows
from cachedit.models.matrix import TITLES
from cachedit.parallel import plan_table, tensor_plans

PATH = Path(__file__).with_name("models.md")
INTRODUCTION = """# Models

Written by `docs/make_models.py` from the tables in `python/cachedit/models/`; a test fails when it is out of date, or
when what it calls tested is not what the tests run (`tests/helpers/pipelines/`). `cachedit models` prints it, and
`cachedit.supported_matrix()` returns it. What is tested works with `cachedit.enable_cache(pipe)`. Of pipelines that are
not, only the transformer is known to work. What is not here is learnt from its first forward, or works with a
`BlockAdapter`.

## What a row says

```python
"AuraFlowTransformer2DModel": _separate(B("joint_transformer_blocks", P1), B("single_transformer_blocks", P3)),
```

The transformer's block lists in calling order, each with its forward pattern, and whether they share a decision. Lists
that carry the same streams do (*linked*, `+` below: a reused step skips the later lists whole). Where streams are
joined or split between two lists (`;` below), each decides for itself. Blocks that call their streams otherwise than
`hidden_states` and `encoder_hidden_states` have the names in the row.

Transformers without a pipeline, at the end, are those that diffusers runs in modular pipelines only; the tests run them
in a loop of their own.

What a loop does between the calls of its blocks needs no row: what ControlNets, face adapters and per-block text add
is part of the stored residual while it falls into the body, and is added as ever after it. HunyuanDiT's long skip
connections reach from the first blocks to the last: with it, `Bn_compute_blocks` must not be larger than
`Fn_compute_blocks`.

## Guidance

*One batch*: all branches in one call. *Named*: one call per branch, inside of `cache_context(name)`. *In turn*: one
call per branch, told apart by their order; a request without guidance is known by its second timestep. *None*: there is
only one branch.

## Adding a model

Ten lines in three files. `InventedTransformer` is a model from elsewhere; the test that runs these very lines has it in
`tests/helpers/invented.py`.

A row in `python/cachedit/models/table.py`. Find the loops over block lists in the transformer's `forward`, and read off
the pattern from what a block takes and returns (README): here hidden states and encoder states, of which it returns the
first. Lists go in calling order, into `_linked(...)` if their streams go on unchanged from list to list.

```python
"InventedTransformer": _separate(B("blocks", P2)),
```

A row in `python/cachedit/models/pipelines.py`: how guidance calls the transformer. If the pipeline has it under another
name than `transformer`, `DENOISERS` says so.

```python
"InventedPipeline": P("InventedTransformer", IN_TURN),
```

A small pipeline to try it on, in a file of `tests/helpers/pipelines/`: the real classes, random weights, four blocks
per list, and how to call it, without and with guidance.

```python
from invented import InventedPipeline, InventedTransformer
from pipelines.common import Tiny, builds, flow, normal


@builds("InventedPipeline")
def _() -> Tiny:
    pipe = InventedPipeline(InventedTransformer(num_layers=4), flow())
    prompt = {"prompt_embeds": normal(1, 5, 16)}
    negative = {"negative_prompt_embeds": normal(1, 5, 16, seed=1)}
    return Tiny(pipe, prompt, negative, branches=2)
```

Then `pytest tests/cachedit/models -k InventedPipeline` proves it: nothing reusable is the baseline bit for bit; a mask
does what plain forward hooks do; branches do not mix; requests of other sizes and lengths in between change nothing.
`python docs/make_models.py` adds it below.

Where a loop does more than call its blocks, and what it does would be lost with them, the row names a `PatchFunctor`.
"""

PARALLEL = """
## On several ranks

How a transformer is shared out by `ParallelismConfig` ([parallelism.md](parallelism.md)): by the plan that diffusers
has for it, by a row of ours (`python/cachedit/parallel/`), or why sequences are not split. Those that are not here work
with the cache on one GPU, or with a `cp_plan` of your own.
"""


def render() -> str:
    """The text of docs/models.md."""
    rows = list(matrix_rows())
    tested = sum(row.pipeline != "" and row.tested == "yes" for row in rows)
    parts = [
        INTRODUCTION,
        f"## Pipelines\n\n{tested} classes are tested.\n",
        *lines(TITLES, ((code(row.pipeline), code(row.transformer), *row[2:]) for row in rows)),
        PARALLEL,
        *lines(("transformer", "split sequences", "tensor parallel"), parallel_rows()),
        "\n## Not in the table\n",
        *lines(("transformer", "reason"), sorted((code(name), reason) for name, reason in UNCOVERED.items())),
    ]
    return "\n".join(parts) + "\n"


def parallel_rows() -> Iterator[tuple[str, ...]]:
    """How each transformer is shared among ranks, for those that are."""
    for name in sorted({*MODELS, *plan_table.PLANS}):
        cls = getattr(diffusers, name, None)
        names = [base.__name__ for base in getattr(cls, "__mro__", ())]
        sequence = "row" if any(base in plan_table.PLANS for base in names) else ""
        tensor = "row" if any(base in tensor_plans.PLANS for base in names) else ""
        sequence = sequence or ("diffusers" if getattr(cls, "_cp_plan", None) else plan_table.UNSPLIT.get(name, ""))
        tensor = tensor or ("diffusers" if getattr(cls, "_tp_plan", None) else "")
        if sequence or tensor:
            yield code(name), sequence, tensor


def code(name: str) -> str:
    """A name, set as code."""
    return f"`{name}`" if name else ""


def lines(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """A markdown table."""
    yield "| " + " | ".join(titles) + " |"
    yield "|" + "---|" * len(titles)
    for cells in rows:
        yield "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PATH.write_text(render())
