import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import cachedit
from cachedit import DBCacheConfig, TaylorSeerCalibratorConfig, alias
from cachedit.cli.app import app
from toys import call_flux, tiny_flux_pipeline

QUICK_START = Path(__file__).parents[2] / "data" / "cache_dit_quick_start.py"


def script(folder, code):
    path = folder / "script.py"
    path.write_text(code)
    return path


def test_an_unchanged_script(tmp_path):
    pipe = tiny_flux_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    mask = cachedit.steps_mask(total_steps=10, mask_policy="fast")
    config = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=10.0,
                           steps_computation_mask=mask, steps_computation_policy="static")  # fmt: skip
    cachedit.enable_cache(pipe, config, TaylorSeerCalibratorConfig())

    command = [sys.executable, "-m", "cachedit", "run", QUICK_START, "model", "--steps", "10", "--save", "cached.pt"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 7, result.stderr
    assert "cached steps: [3, 5, 6, 8]" in result.stdout
    torch.testing.assert_close(torch.load(tmp_path / "cached.pt"), call_flux(pipe, 10), rtol=1e-4, atol=1e-5)
    assert f"tag: {cachedit.strify(pipe)}" in result.stdout


@pytest.fixture
def in_process(monkeypatch):
    """As ``cachedit run``, without starting Python for each script."""
    monkeypatch.setattr(sys, "argv", ["cachedit"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield lambda *arguments: CliRunner().invoke(app, ["run", *map(str, arguments)])
    alias.uninstall()


def test_the_script_sees_what_python_would_show_it(tmp_path, in_process):
    (tmp_path / "sibling_of_the_script.py").write_text("here = True")
    path = script(
        tmp_path,
        """
import sys
import sibling_of_the_script

assert __name__ == "__main__" and vars(sys.modules["__main__"]) is globals()
print(__file__, sys.argv, sibling_of_the_script.here)
""",
    )
    for arguments in ([], ["--help", "-x", "a b", "--", "--override"]):
        assert in_process(path, *arguments).stdout == f"{path} {[str(path), *arguments]} True\n"


@pytest.mark.parametrize(
    ("code", "returned", "error"),
    [
        ("", 0, ""),
        ("raise SystemExit", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no model')", 1, "no model\n"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt\n"),
        ("raise EOFError('end')", 1, "EOFError: end\n"),
        ("def f():\n    1 / 0\nf()", 1, "ZeroDivisionError: division by zero\n"),
        ("x = = 1", 1, "SyntaxError: invalid syntax\n"),
        ("from cache_dit import layerwise_offload", 1, "not available in this version yet: layerwise offloading\n"),
    ],
)
def test_exit_codes(tmp_path, in_process, code, returned, error):
    result = in_process(script(tmp_path, code))
    assert result.exit_code == returned and result.stderr.endswith(error)
    if "1 / 0" in code:  # the traceback begins with the script
        assert result.stderr.splitlines()[1].endswith('script.py", line 3, in <module>')


def test_without_a_script(tmp_path, in_process):
    result = in_process(tmp_path / "missing.py")
    assert result.exit_code == 2 and "Invalid value for" in result.stderr
