import pytest
from typer.testing import CliRunner

from cachedit.cli.app import app
from cachedit.models import matrix_rows


def invoke(*arguments, columns=300):
    return CliRunner().invoke(app, ["models", *arguments], env={"COLUMNS": str(columns)})


def table(output):
    """The cells of the rows below the titles."""
    lines = [line.strip().strip("│").split("│") for line in output.splitlines() if line.startswith("│")]
    return [tuple(cell.strip() for cell in cells) for cells in lines]


def test_all_rows():
    result = invoke()
    assert result.exit_code == 0 and table(result.stdout) == list(matrix_rows())


@pytest.mark.parametrize("name", ["qwenimage", "SD3Transformer"])
def test_filter(name):
    rows = [row for row in matrix_rows() if name.lower() in f"{row.pipeline} {row.transformer}".lower()]
    assert table(invoke("--filter", name).stdout) == rows and 2 < len(rows) < 20


def test_narrow_terminals_lose_no_letters():
    assert "StableDiffusion3ControlNetPipeline" in "".join(
        row[0] for row in table(invoke("--filter", "StableDiffusion3ControlNetPipeline", columns=80).stdout)
    )


def test_unknown_names():
    result = invoke("--filter", "nothing")
    assert result.exit_code == 2 and "no pipeline or transformer has 'nothing' in its name" in result.stderr
