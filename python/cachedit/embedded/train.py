"""Trains the embedded model from scratch: ``python -m cachedit.embedded.train --out DIR``.

Flow matching on pictures drawn on the fly from random scenes (nothing held out is ever drawn): x_t = (1 - t) x +
t noise, the network predicts noise - x, plain mean squared error. 80% of the times t are logit-normal, 20% uniform.
Muon (with the update scale of arXiv 2502.16982) on the blocks' matrices, AdamW on everything else, warm-up, a linear
decay over the last part, gradient clipping, an exponential moving average of the weights, bf16 autocast. Every
``--save-every`` steps DIR holds a pipeline of the averaged weights (DIR/pipeline), the state to resume from
(DIR/state.pt) and a log (DIR/log.csv: step, loss, lr, seconds, held_out_loss, check).
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb

from .check import check_pipeline
from .draw import draw_scenes
from .pipeline import EmbeddedPipeline, image_ids, pack
from .scene import sample_scene
from .text import POOLED_DIM, TOKEN_DIM, encode_scenes, text_ids

CONFIG = {
    "patch_size": 1,
    "in_channels": 48,
    "num_layers": 4,
    "num_single_layers": 8,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": TOKEN_DIM,
    "pooled_projection_dim": POOLED_DIM,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
HELD_OUT_BATCH = 128
LOG_FIELDS = ("step", "loss", "lr", "seconds", "held_out_loss", "check")


class TrainingAttention:
    """Flux attention as two batched matrix products and a softmax: in bf16 on CPU its backward is faster."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        def heads(x: Any) -> Any:
            return x.unflatten(-1, (-1, attn.head_dim))

        query = attn.norm_q(heads(attn.to_q(hidden_states)))
        key = attn.norm_k(heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            query = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states))), query], dim=1)
            key = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states))), key], dim=1)
            value = torch.cat([heads(attn.add_v_proj(encoder_hidden_states)), value], dim=1)
        turned: list[Any] = [apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key)]
        query, key, value = (x.transpose(1, 2).to(torch.bfloat16) for x in (*turned, value))
        weights = (query @ key.transpose(2, 3) * attn.head_dim**-0.5).softmax(dim=-1, dtype=torch.float32)
        out = (weights.to(torch.bfloat16) @ value).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        text = encoder_hidden_states.shape[1]
        return attn.to_out[0](out[:, text:]), attn.to_add_out(out[:, :text])


def build_transformer() -> Any:
    """The untrained network; modulations and the output start at zero, so that every block starts as the identity."""
    model: Any = FluxTransformer2DModel(**CONFIG)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (".norm" in name or name.startswith(("norm_out", "proj_out"))):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


def optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "transformer_blocks" in name]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def batch_of(rng: random.Random, generator: torch.Generator, size: int, split: str) -> Batch:
    """Packed pictures in -1 to 1 [B, 64, 48], noise of the same shape, times [B], tokens and pooled vectors."""
    scenes = [sample_scene(rng, split) for _ in range(size)]
    clean = pack(draw_scenes(scenes, generator) * 2 - 1)
    noise = torch.randn(clean.shape, generator=generator)
    normal, uniform = torch.randn(size, generator=generator), torch.rand(size, generator=generator)
    times = torch.where(torch.rand(size, generator=generator) < 0.8, normal.sigmoid(), uniform)
    return clean, noise, times, *encode_scenes(scenes)


def flow_loss(model: Callable[..., Any], batch: Batch, img_ids: torch.Tensor, txt_ids: torch.Tensor) -> torch.Tensor:
    clean, noise, times, tokens, pooled = batch
    mixed = clean + times[:, None, None] * (noise - clean)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(
            hidden_states=mixed,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=times,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0]
    return F.mse_loss(out.float(), noise - clean)


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay_share: float) -> float:
    decay_from = steps * (1 - decay_share)
    falling = 1.0 if step < decay_from else (steps - step) / max(steps - decay_from, 1)
    return peak * min(1.0, (step + 1) / warmup) * max(falling, 0.0)


def save(
    out: Path,
    step: int,
    model: Any,
    average: Any,
    optimizer_list: list[torch.optim.Optimizer],
    rng: random.Random,
    generator: torch.Generator,
    keep: bool,
) -> Any:
    """Writes the averaged weights as a pipeline in fp16 and the state to resume from; returns the pipeline in fp32."""
    pipeline: Any = EmbeddedPipeline(copy.deepcopy(average), FlowMatchEulerDiscreteScheduler())
    half: Any = EmbeddedPipeline(copy.deepcopy(average).half(), FlowMatchEulerDiscreteScheduler())
    half.save_pretrained(out / "pipeline", safe_serialization=True)
    if keep:
        half.save_pretrained(out / f"pipeline-{step:06d}", safe_serialization=True)
    state = {
        "step": step,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizer_list],
        "rng": rng.getstate(),
        "generator": generator.get_state(),
    }
    torch.save(state, out / "state.tmp")
    os.replace(out / "state.tmp", out / "state.pt")
    return pipeline


def continue_log(path: Path, step: int) -> float:
    """Cuts the log back to ``step`` (0 starts a new one) and returns the seconds that it stood at."""
    rows = []
    if step > 0 and path.exists():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, LOG_FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return float(rows[-1]["seconds"]) if rows else 0.0


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    model = build_transformer()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer_list = optimizers(model, args.lr)
    start = 0
    if args.resume and (out / "state.pt").exists():
        state = torch.load(out / "state.pt", weights_only=False)
        start = state["step"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizer_list, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        rng.setstate(state["rng"])
        generator.set_state(state["generator"])
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(TrainingAttention())
    runner = torch.compile(model) if args.compile else model
    img_ids, txt_ids = image_ids(), text_ids()
    held_out = batch_of(random.Random(1234), torch.Generator().manual_seed(1234), HELD_OUT_BATCH, "held_out")
    parameters, averaged = list(model.parameters()), list(average.parameters())
    log_path = out / "log.csv"
    began, total, count = time.time() - continue_log(log_path, start), 0.0, 0
    for step in range(start, args.steps):
        lr = learning_rate(step, args.steps, args.lr, args.warmup, args.decay_share)
        for optimizer in optimizer_list:
            for group in optimizer.param_groups:
                group["lr"] = lr
        loss = flow_loss(runner, batch_of(rng, generator, args.batch, "train"), img_ids, txt_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizer_list:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(args.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(averaged, parameters, 1 - decay)
        total, count = total + loss.item(), count + 1
        done = step + 1
        if done % args.log_every and done != args.steps and done % args.save_every:
            continue
        row: dict[str, object] = {
            "step": done,
            "loss": f"{total / count:.5f}",
            "lr": f"{lr:.6f}",
            "seconds": f"{time.time() - began:.1f}",
        }
        total, count = 0.0, 0
        if done % args.save_every == 0 or done == args.steps:
            keep = args.keep_every > 0 and done % args.keep_every == 0
            pipeline = save(out, done, model, average, optimizer_list, rng, generator, keep)
            with torch.no_grad():
                row["held_out_loss"] = f"{flow_loss(pipeline.transformer, held_out, img_ids, txt_ids).item():.5f}"
            if args.check_every and (done % args.check_every == 0 or done == args.steps):
                pipeline.set_progress_bar_config(disable=True)
                row["check"] = f"{check_pipeline(pipeline, prompts=args.check_prompts, steps=10).share:.4f}"
        with log_path.open("a", newline="") as file:
            csv.DictWriter(file, LOG_FIELDS, restval="", lineterminator="\n").writerow(row)
        print(row, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="cachedit.embedded.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder for the pipeline, the resume state and the log")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of both optimisers")
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--decay-share", type=float, default=0.4, help="share of the steps over which lr falls to zero")
    parser.add_argument("--ema", type=float, default=0.997)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=max(torch.get_num_threads(), 1))
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=300)
    parser.add_argument("--keep-every", type=int, default=0, help="also keep pipeline-STEP every so many steps")
    parser.add_argument("--check-every", type=int, default=1500, help="pixel check on held-out prompts; 0: never")
    parser.add_argument("--check-prompts", type=int, default=60)
    parser.add_argument("--resume", action="store_true", help="go on from DIR/state.pt")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
