"""The types and the configuration file of docs/quantization.md are those of the package."""

import re
from pathlib import Path

import cachedit
from cachedit.quantization.types import _ALIASES, QUANT_TYPES

PAGE = (Path(__file__).parents[2] / "docs/quantization.md").read_text()
TYPES = PAGE.partition("## Which layers")[0]


def test_the_table_has_every_type_and_name():
    rows = [line.split("|") for line in TYPES.splitlines() if re.match(r"\| `(float|int)\w+` \|.*\|.*\|.*\|.*\|", line)]
    assert [row[1].strip(" `") for row in rows] == list(QUANT_TYPES)
    for row in rows:
        name = row[1].strip(" `")
        assert re.findall(r"`(\w+)`", row[2]) == [alias for alias, meant in _ALIASES.items() if meant == name]
        capability = QUANT_TYPES[name].capability
        assert ("{}.{}".format(*capability) in row[5]) if capability else row[5].isspace()


def test_the_file(tmp_path):
    (tmp_path / "cache.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.S)[1])
    loaded = cachedit.load_configs(tmp_path / "cache.yaml")
    assert loaded["quantize_config"] == cachedit.QuantizeConfig(
        quant_type="float8_weight_only", exclude_layers=["embed", "proj_out"]
    )
