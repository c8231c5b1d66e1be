"""Every fenced block of README.md, CONTRIBUTING.md and docs/*.md is run, or named in LISTED with the reason why not.

A page is followed from its top, in one folder and with one set of names, as a reader would: Python is executed;
configuration files are written to ``cache.yaml``, loaded and applied; commands are run, or parsed by what would run
them; messages are provoked.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import cachedit
from cachedit.cli.app import app
from cachedit.integrations.vllm_omni import CacheDiTBackend
from cachedit.models import signals
from stand_ins import apply, embedded, flux, ranks, states, wan
from toys import make_toy

ROOT = Path(__file__).parents[2]
PAGES = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))


FENCE = re.compile(r"^ *```([^\n]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    line: int  # of its first line, from 1
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [Block(text.count("\n", 0, fence.start(2)) + 1, fence[1], fence[2]) for fence in FENCE.finditer(text)]


# Blocks that are not run here, by page and how they begin: where else they stand or are run, or why they cannot be.
LISTED = {
    ("docs/attention.md", "attention_backend '_native_flash'"): "tests/cachedit/test_attention.py",
    ("docs/models.md", '"AuraFlow'): "python/cachedit/models/table.py",
    ("docs/models.md", '"InventedTransformer"'): "tests/cachedit/models/test_adding.py",
    ("docs/models.md", '"InventedPipeline"'): "tests/cachedit/models/test_adding.py",
    ("docs/models.md", "from invented"): "tests/cachedit/models/test_adding.py",
    (
        "docs/quantization.md",
        "import torch\nfrom diffusers import",
    ): "needs weights, and a GPU for diffusers",
    ("docs/sglang.md", "mkdir -p shim"): "tests/cachedit/integrations/test_switch.py",
    ("docs/vllm-omni.md", "mkdir -p shim"): "tests/cachedit/integrations/test_switch.py",
    ("docs/vllm-omni.md", "from cachedit.integrations"): "tests/cachedit/integrations/test_vllm_omni.py",
    ("docs/vllm-omni.md", "from cachedit import ForwardPattern"): "tests/cachedit/integrations/test_vllm_omni.py",
}
# Flags with which `cachedit generate` is parsed, but not run.
PARSED = {
    "--model-path": "downloads a model",
    "--num-gpus": "starts processes; tests/cachedit/cli/test_generate.py does",
}
# Files that make the messages which pages show, in their order.
MESSAGES = {
    "docs/config-files.md": [
        "cache_config: {enable_seperate_cfg: true}",
        "cache_config: {max_warmup_steps: many}",
        "cache_config: {enable_taylorseer: true, taylorseer_order: 9}",
        "cache_config: {}\nmax_warmup_steps: 8",
        "cache_config:\n  Fn_compute_blocks: 1\n  a: b: c",
        "cache_config:\n\n\n\n\n  Fn_compute_blocks: 1\n  Fn_compute_blocks: 2",
    ],
    "docs/quantization.md": ["quantize_config: {quant_type: float8_per_row, exclude_layers: [norm]}"],
}
# Files that following a page leaves.
LEAVES = {
    "docs/cli.md": [
        "outputs/a_red_circle_left_of_a_blue_square.png",
        *("outputs/circle.png", "outputs/circle-plain.png", "table.csv", "table.md", "worst.png"),
    ],
}

# What blocks may use without making it. Imports are the page's own.


def transformer() -> Any:
    """One that nothing describes, called as docs/serving.md and docs/comfyui.md call it."""
    torch.manual_seed(0)
    return runpy.run_path(str(ROOT / "examples/transformer_only.py"))["Transformer"]().eval().requires_grad_(False)


def job() -> SimpleNamespace:
    inputs = {"x": states(1, 8, 64), "time": torch.ones(1), "prompt": torch.tensor([3])}
    return SimpleNamespace(id=7, steps=4, inputs=lambda: inputs)


NAMES = {
    "pipe": embedded,
    "prompt": lambda: "a red circle left of a blue square",
    "prompts": lambda: ["a red circle left of a blue square"],
}
NAMES_OF = {
    "README.md": {
        "model": make_toy,
        **dict.fromkeys(("before", "after", "anchor", "hidden"), lambda: states(2, 8, 16)),
        "ring": lambda: states(2, 2, 8, 16),
        "slot": lambda: 1,
    },
    "docs/comfyui.md": {
        "transformer": transformer,
        "job": job,
        "latents": lambda: states(1, 8, 64),
        "time": lambda: torch.ones(1),
        "prompt": lambda: torch.tensor([3]),
    },
    "docs/parallel-vae.md": {
        "pipe": flux,
        "latents": lambda: states(1, 2, 128, 128),
    },
    "docs/policies.md": {"wan_pipe": wan},
    "docs/serving.md": {"transformer": transformer, "job": job},
    "docs/sglang.md": {"transformer": transformer, "process_group": lambda: torch.distributed.group.WORLD},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, where nothing is downloaded and what is registered is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", embedded)
    monkeypatch.setattr(signals, "SIGNALS", dict(signals.SIGNALS))
    with ranks(8):
        yield tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_page_works(page, folder):
    code = "".join(block.text for block in blocks(page) if block.language == "python")
    makers = NAMES | NAMES_OF.get(page, {})
    names = {name: make() for name, make in makers.items() if re.search(rf"\b{name}\b", code)}
    for block in blocks(page):
        if not any(page == of and block.text.startswith(start) for of, start in LISTED):
            assert block.language in RUN, f"{page}:{block.line}: neither run nor listed"
            RUN[block.language](page, block, names)
    assert all((folder / file).stat().st_size for file in LEAVES.get(page, ()))


def test_what_is_listed_is_there_and_elsewhere():
    for (page, start), why in LISTED.items():
        (text,) = [block.text for block in blocks(page) if block.text.startswith(start)]
        if why.endswith(".py"):
            source = (ROOT / why).read_text()
            assert Path(page).name in source or text in source, f"{why} neither reads {page} nor has these lines"


@pytest.mark.parametrize("page", PAGES)
def test_code_is_in_fences(page):
    """Blocks that are indented instead would escape."""
    prose = FENCE.sub("", (ROOT / page).read_text())
    assert not re.findall(r"\n\n    \S.*", prose) and "```" not in prose


def anchors(page: Path) -> set[str]:
    """What links may name behind `#`, by GitHub's rules."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", (ROOT / page).read_text()):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists() and (not anchor or anchor in anchors(path)), target


def test_architecture_has_every_module():
    page = (ROOT / "docs/architecture.md").read_text()
    modules = (ROOT / "python/cachedit").glob("[!_]*")
    names = [path.name + "/" * path.is_dir() for path in modules if path.suffix in ("", ".py")]
    assert [name for name in names if f"`{name}`" not in page] == []


def run_python(page: str, block: Block, names: dict[str, Any]) -> None:
    exec(compile("\n" * (block.line - 1) + block.text, ROOT / page, "exec"), names)


def run_yaml(page: str, block: Block, names: dict[str, Any]) -> None:
    Path("cache.yaml").write_text(block.text)
    configs = cachedit.load_configs("cache.yaml")
    assert any(configs.values())
    apply(flux(), configs)


def run_text(page: str, block: Block, names: dict[str, Any]) -> None:
    """Messages, one a line."""
    for message, text in zip(block.text.splitlines(), MESSAGES[page], strict=True):
        Path("cache.yaml").write_text(text)
        with pytest.raises(ValueError) as raised:
            cachedit.enable_cache(flux(), **cachedit.load_configs("cache.yaml"))
        assert str(raised.value) == message


def run_shell(page: str, block: Block, names: dict[str, Any]) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            variables = {}
            while re.match(r"[A-Z_]+=", words[0]):
                name, _, variables[name] = words.pop(0).partition("=")
            assert words[0] in COMMANDS, f"{page}: nothing is known of the command {words[0]}"
            COMMANDS[words[0]](words[1:], variables)


RUN = {"python": run_python, "yaml": run_yaml, "text": run_text, "bash": run_shell}


def cachedit_command(words: list[str], variables: dict[str, str]) -> None:
    if PARSED.keys() & set(words):
        name, command, rest = get_command(app).resolve_command(None, words)
        assert not command.make_context(name, rest).args
        return
    result = CliRunner().invoke(app, words, env=variables)
    assert result.exit_code == 0, result.output


class Parsed(Exception):
    """Arguments were understood, and that is all that was asked for."""


def python_command(words: list[str], variables: dict[str, str]) -> None:
    """Scripts run until they have parsed their arguments; `-m cachedit run` runs one that says what it got."""
    if words[:3] == ["-m", "cachedit", "run"]:
        Path(words[3]).write_text("import sys, cache_dit\nprint(cache_dit.enable_cache.__module__, *sys.argv[1:])")
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["cachedit.api", *words[4:]]
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_args(*args: Any) -> None:
        parse(*args)
        raise Parsed

    script = ROOT / words[0]
    if script.name == "compare_cache_dit.py" and importlib.util.find_spec("cache_dit") is None:
        return  # imports it before anything else
    with (
        mock.patch.object(sys, "argv", [str(script), *words[1:]]),
        mock.patch.object(sys, "path", [str(script.parent), *sys.path]),
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args),
        pytest.raises(Parsed),
    ):
        runpy.run_path(str(script), run_name="__main__")


def torchrun_command(words: list[str], variables: dict[str, str]) -> None:
    from torch.distributed.run import get_args_parser

    arguments = get_args_parser().parse_args(words)
    python_command([arguments.training_script, *arguments.training_script_args], variables)


def pip_command(words: list[str], variables: dict[str, str]) -> None:
    """The package from its folder, with extras that there are."""
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = re.findall(r"^([\w-]+) = \[", section, re.MULTILINE)
    assert words[0] in ("install", "wheel")
    for word in words[1:]:
        target = re.fullmatch(r"-e|\.(?:\[(?P<extras>[\w,-]+)\])?", word)
        assert target and set((target["extras"] or "").split(",")) <= {"", *extras}, word


def make_command(words: list[str], variables: dict[str, str]) -> None:
    assert all(re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for word in words)


def copy_command(words: list[str], variables: dict[str, str]) -> None:
    assert words[0] == "-r" and (ROOT / words[1]).is_dir()


def vllm_command(words: list[str], variables: dict[str, str]) -> None:
    """Is not here; the settings are ours."""
    CacheDiTBackend(json.loads(words[words.index("--cache-config") + 1]))


def sglang_command(words: list[str], variables: dict[str, str]) -> None:
    """Is not here; `cachedit generate` has the same flags."""
    cachedit_command(words, variables)


COMMANDS = {
    "cachedit": cachedit_command,
    "cp": copy_command,
    "make": make_command,
    "pip": pip_command,
    "python": python_command,
    "sglang": sglang_command,
    "torchrun": torchrun_command,
    "vllm": vllm_command,
}
