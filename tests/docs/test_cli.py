import re
from pathlib import Path

from typer.main import get_command

from cachedit.cli import environment, metrics
from cachedit.cli.app import app

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


def test_the_page_names_every_flag_variable_and_metric():
    options = get_command(app).commands["generate"].params
    names = [(*option.opts, *option.secondary_opts) for option in options if not option.hidden]
    names += [
        action.option_strings for action in metrics.parser()._actions if action.option_strings and action.dest != "help"
    ]
    names += [(name,) for name in (*environment.VARIABLES, *metrics.CHOICES)]
    assert len(names) > 50
    for aliases in names:
        assert any(re.search(rf"`[^`]*(?<![\w-]){re.escape(name)}(?![\w-])[^`]*`", PAGE) for name in aliases), aliases
