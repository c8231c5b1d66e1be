"""``cachedit metrics``, also installed as ``cache-dit-metrics-cli``.

One argparse parser for both names, not typer: scripts in use give several values to one flag (``-ptags a b``).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..metrics.compare import METRICS, Comparison, compare, load_distribution, load_pairwise, mean
from ..metrics.prompt import PROMPT_METRICS, score
from ..metrics.sources import PICTURES, VIDEOS, matched_files, media_files
from . import report

CHOICES = (*METRICS, *PROMPT_METRICS, "all")
NEEDED = "nothing to compare: give -i1 and -i2, -v1 and -v2, -p and -i2, -d and -r, -d and -rp, or -vd and -rv"


class Job(NamedTuple):
    """One row of the table: a file or folder, and what it is compared with."""

    name: str
    true: str | None
    test: str
    prompts: str | None


def parser() -> argparse.ArgumentParser:
    """The flags of ``cache-dit-metrics-cli``, and a few more."""
    parser = argparse.ArgumentParser(
        prog="cachedit metrics", description="Compare pictures and videos with a baseline, and with their prompts."
    )
    add = parser.add_argument
    add("metrics", nargs="+", choices=CHOICES, metavar="METRIC", help=f"one or several of {', '.join(CHOICES)}")
    add("-i1", "--img-true", help="baseline: a picture, or a folder of pictures")
    add("-i2", "--img-test", help="what to compare with it; in folders, files of one name go together")
    add("-p", "--prompt-true", help="text file with a prompt per line, for clip_score and image_reward of --img-test")
    add("-v1", "--video-true", help="baseline: a video, or a folder of videos")
    add("-v2", "--video-test", help="what to compare with it")
    add("-d", "--img-source-dir", help="folder with several folders of pictures, each compared with --ref-img-dir")
    add("-r", "--ref-img-dir", help="the baseline of --img-source-dir")
    add("-rp", "--ref-prompt-true", help="the prompts of each folder in --img-source-dir")
    add("-vd", "--video-source-dir", help="folder with several videos, each compared with --ref-video")
    add("-rv", "--ref-video", help="the baseline of --video-source-dir")
    add("-b", "--fid-batch-size", type=int, default=1, help="pictures that go through Inception at a time")
    add("-verbose", "--enable-verbose", action="store_true", help="progress bars also where output is no terminal")
    add("-s", "--summary", action="store_true", help="without effect: the table is always printed")
    add("-plog", "--perf-log", type=Path, help="log with lines that hold a compared name and 'tag: number'")
    add("-ptags", "--perf-tags", nargs="+", default=[], metavar="TAG", help="numbers of --perf-log to show beside it")
    add("-extra-ptags", "--extra-perf-tags", nargs="+", default=[], metavar="TAG", help="only lines with all of these")
    add("--cal-speedup", action="store_true", help="for each of --perf-tags, how many times less than the most it is")
    add("--psnr-type", choices=("custom", "skimage"), default="custom", help="without effect: both mean the same")
    add("-table", "--gen-markdown-table", action="store_true", help="print the table as Markdown")
    add("--csv", type=Path, help="write the table to this file, too")
    add("--markdown", type=Path, help="write the table to this file, too")
    add("--worst", type=Path, help="draw the pairs with the largest differences side by side into this file")
    add("--worst-count", type=int, default=4, help="how many pairs to draw")
    return parser


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code. Wrong arguments end the process with code 2 and one line on stderr."""
    flags = parser()
    args = flags.parse_args(arguments)
    try:
        jobs = _jobs(args)
        console = Console(width=None if sys.stdout.isatty() else 200)
        results, notes = _results(jobs, args, console)
        table = report.Table(_metrics(results), _rows(jobs, results, args))
        if args.worst:
            compared = [(job.true, job.test, found) for job, found in zip(jobs, results, strict=True) if job.true]
            report.draw_worst(args.worst, compared, args.worst_count)
        for path, text in ((args.csv, table.csv()), (args.markdown, table.markdown())):
            if path:
                path.write_text(text, encoding="utf-8")
    except (ValueError, OSError, ImportError) as error:
        flags.exit(2, f"{flags.prog}: {error}\n")
    console.print(table.markdown() if args.gen_markdown_table else table.rich(), markup=False)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    return 0


def _jobs(args: argparse.Namespace) -> list[Job]:
    jobs = list(_all_jobs(args))
    if not jobs:
        raise ValueError(NEEDED)
    for path in {path for job in jobs for path in (job.true, job.test, job.prompts) if path}:
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no file or folder {path}")
    return jobs


def _all_jobs(args: argparse.Namespace) -> Iterator[Job]:
    if args.img_test and (args.img_true or args.prompt_true):
        yield Job(_name(args.img_test), args.img_true, args.img_test, args.prompt_true)
    if args.video_true and args.video_test:
        yield Job(_name(args.video_test), args.video_true, args.video_test, None)
    if args.img_source_dir and (args.ref_img_dir or args.ref_prompt_true):
        for folder in sorted(path for path in Path(args.img_source_dir).iterdir() if path.is_dir()):
            if not args.ref_img_dir or folder.resolve() != Path(args.ref_img_dir).resolve():
                yield Job(folder.name, args.ref_img_dir, str(folder), args.ref_prompt_true)
    if args.video_source_dir and args.ref_video:
        for video in media_files(args.video_source_dir, VIDEOS):
            if video.resolve() != Path(args.ref_video).resolve():
                yield Job(video.name, args.ref_video, str(video), None)


def _name(path: str) -> str:
    return Path(path).resolve().name


def _results(jobs: Sequence[Job], args: argparse.Namespace, console: Console) -> tuple[list[Comparison], list[str]]:
    """What came of each job, and what of ``all`` could not be computed, and why."""
    results, notes = [], dict[str, None]()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not (console.is_terminal or args.enable_verbose)) as progress:
        for job in jobs:
            task = progress.add_task(job.name, total=None)
            chosen = [name for name in dict.fromkeys(args.metrics) if name != "all"]
            if "all" in args.metrics:
                possible, reasons = _possible(job)
                chosen = list(dict.fromkeys([*possible, *chosen]))
                notes |= dict.fromkeys(reasons)

            def advance(done: int, files: int, task: object = task) -> None:
                progress.update(task, completed=done, total=files)  # type: ignore[arg-type]

            results.append(_result(job, chosen, args.fid_batch_size, advance))
    return results, list(notes)


def _result(job: Job, chosen: Sequence[str], fid_batch_size: int, advance: report.Advance) -> Comparison:
    result = Comparison()
    of_pairs = [name for name in chosen if name in METRICS]
    if job.true is None and of_pairs:
        raise ValueError(f"{of_pairs[0]} needs a baseline: -i1, -v1, -r or -rv")
    if job.true is not None and of_pairs:
        result = compare(of_pairs, job.true, job.test, fid_batch_size, advance)
    for name in chosen:
        if name in PROMPT_METRICS:
            if job.prompts is None:
                raise ValueError(f"{name} needs prompts: -p or -rp")
            scores = score(PROMPT_METRICS[name], job.test, job.prompts, advance)
            result.values[name], result.count = mean([value for _, value in scores]), len(scores)
    return result


def _possible(job: Job) -> tuple[list[str], list[str]]:
    possible, reasons = [], []
    for name in (*(METRICS if job.true else ()), *(PROMPT_METRICS if job.prompts else ())):
        try:
            if name == "fid":
                load_distribution()
                files = matched_files(str(job.true), job.test)
                if len(files) == 1 and Path(str(files[0][1])).suffix.lower() in PICTURES:
                    raise ValueError("it needs at least two pictures")
            elif name in METRICS:
                load_pairwise(name)
            else:
                PROMPT_METRICS[name]()
            possible.append(name)
        except (FileNotFoundError, ImportError, ValueError) as error:
            reasons.append(f"{name} is left out: {error}")
    return possible, reasons


def _metrics(results: Sequence[Comparison]) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in result.values))


def _rows(jobs: Sequence[Job], results: Sequence[Comparison], args: argparse.Namespace) -> list[report.Row]:
    lines = args.perf_log.read_text(encoding="utf-8").splitlines() if args.perf_log else []
    lines = [line for line in lines if all(tag.lower() in line.lower() for tag in args.extra_perf_tags)]
    rows = [report.Row(job.name, result.count, result.values) for job, result in zip(jobs, results, strict=True)]
    for tag in args.perf_tags if args.perf_log else ():
        numbers = [_logged(lines, row.name, tag) for row in rows]
        baselines = [_logged(lines, _name(job.true), tag) for job in jobs if job.true]
        most = max((number for number in (*numbers, *baselines) if number is not None), default=None)
        for row, number in zip(rows, numbers, strict=True):
            row.logged[tag] = number
            if args.cal_speedup:
                row.logged[f"{tag} speedup"] = most / number if most and number else None
    return rows


def _logged(lines: Sequence[str], name: str, tag: str) -> float | None:
    found = (re.search(rf"{re.escape(tag)}\s*:\s*(\d+\.?\d*)", line, re.IGNORECASE) for line in lines if name in line)
    numbers = [float(match[1]) for match in found if match]
    return sum(numbers) / len(numbers) if numbers else None
