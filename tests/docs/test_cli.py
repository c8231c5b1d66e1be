"""What docs/cli.md shows in fences is run, in its order and in one folder."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cachedit.cli import environment, metrics
from cachedit.cli.app import app

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no weights
    return tmp_path


def run(line):
    words = shlex.split(line)
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    command = [word for word in words if "=" not in word]
    assert command[0] == "cachedit"
    result = CliRunner().invoke(app, command[1:], env=variables)
    assert result.exit_code == 0, f"{line}\n{result.output}"
    return result.output


def test_the_page_works(folder):
    outputs = []
    for kind, text in BLOCKS:
        if kind == "yaml":
            (folder / "cache.yaml").write_text(text)
        elif kind == "python":
            namespace = {}
            exec(text, namespace)
            assert 20 < namespace["value"] < 60 and namespace["count"] == 1
        else:
            outputs += map(run, text.splitlines())
    assert len(outputs) == 6 and "lpips is left out" in outputs[4]
    for file in ("circle.png", "circle-plain.png", "a_red_circle_left_of_a_blue_square.png"):
        assert (folder / "outputs" / file).is_file()
    assert all((folder / file).stat().st_size for file in ("table.csv", "table.md", "worst.png"))


def test_the_page_names_every_flag_variable_and_metric():
    from typer.main import get_command

    options = get_command(app).commands["generate"].params
    names = [(*option.opts, *option.secondary_opts) for option in options if not option.hidden]
    names += [
        action.option_strings for action in metrics.parser()._actions if action.option_strings and action.dest != "help"
    ]
    names += [(name,) for name in (*environment.VARIABLES, *metrics.CHOICES)]
    assert len(names) > 50
    for aliases in names:
        assert any(re.search(rf"`[^`]*(?<![\w-]){re.escape(name)}(?![\w-])[^`]*`", PAGE) for name in aliases), aliases
