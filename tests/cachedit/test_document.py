import re
import sys

import pytest

from cachedit.document import read_document


def write(folder, content, name="cache.yaml"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_content_and_the_beginning_of_errors(tmp_path):
    path = write(tmp_path, "a: 1\nb: [x, {c: 2}]\n")
    assert read_document(path) == ({"a": 1, "b": ["x", {"c": 2}]}, f"{path}: ")
    path = write(tmp_path, '{"a": 1, "b": ["x", {"c": 2}]}', "cache.json")
    assert read_document(str(path)) == ({"a": 1, "b": ["x", {"c": 2}]}, f"{path}: ")


def test_a_dictionary_is_copied():
    given = {"a": 1}
    content, where = read_document(given)
    assert (content, where) == (given, "")
    assert content is not given


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    assert read_document(write(tmp_path, "\ufeffa: 1"))[0] == {"a": 1}
    assert read_document(write(tmp_path, '\ufeff{"a": 1}', "cache.json"))[0] == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: c: d\n", ":2: malformed YAML: mapping values are not allowed here"),
        ("a: 1\nb: [1\nc: 2\n", ":3: malformed YAML: "),
        ("a: 1\n\tb: 2\n", ":2: malformed YAML: "),
        ("a: 1\n--- \nb: 1\n", ":2: malformed YAML: but found another document"),
        (
            "a: 1\nb: !!python/object:os.system {}\n",
            ":2: malformed YAML: could not determine a constructor for the tag",
        ),
        ("a: 1\nb: *c\n", ":2: malformed YAML: found undefined alias"),
        ("a: 1\nb: \x07\n", ":2: malformed YAML: special characters are not allowed"),
        ("a: 1\nb:\n  c: 1\n  c: 1\n", ":4: c is given twice"),
        ("a:\n- {b: 1}\n- {b: 1, b: 2}\n", ":3: b is given twice"),
        ("a: 1\nb: 2000-13-01\n", ": malformed YAML: month must be in 1..12"),
        (b"a: 1\nb: \xff\n", ":2: not UTF-8: invalid start byte"),
        ("", ": the file must hold a mapping of keys, got None"),
        ("- a\n", ": the file must hold a mapping of keys, got ['a']"),
    ],
)
def test_malformed_yaml(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}{message}")):
        read_document(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1,\n "b": }', ":2: malformed JSON: Expecting value"),
        ("", ":1: malformed JSON: Expecting value"),
        ('{"a": {"b": 1, "b": 2}}', ": b is given twice"),
        ("[1]", ": the file must hold a mapping of keys, got [1]"),
    ],
)
def test_malformed_json(tmp_path, content, message):
    path = write(tmp_path, content, "cache.json")
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}{message}")):
        read_document(path)


@pytest.mark.parametrize("name", ["absent.yaml", "absent.json"])
def test_missing_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / name))):
        read_document(tmp_path / name)


def test_without_pyyaml_there_is_json(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    for name in ("cache.json", "cache.JSON"):
        assert read_document(write(tmp_path, '{"a": 1}', name))[0] == {"a": 1}
    path = write(tmp_path, "a: 1")
    with pytest.raises(ImportError, match=re.escape(f"{path}: YAML files need PyYAML (pip install pyyaml)")):
        read_document(path)


def test_aliases_and_merge_keys_are_yaml(tmp_path):
    path = write(tmp_path, "base: &base {a: 1, b: 2}\nuse:\n  <<: *base\n  b: 3\n")
    assert read_document(path)[0]["use"] == {"a": 1, "b": 3}
    content = read_document(write(tmp_path, "a: &a [*a]\n"))[0]
    assert content["a"][0] is content["a"]
