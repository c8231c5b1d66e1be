import pytest

from cachedit import CacheType, block_range, cache_type


@pytest.mark.parametrize(
    ("name", "member"),
    [
        (None, "NONE"), ("none", "NONE"), ("no_cache", "NONE"), ("NoCache", "NONE"), ("NC", "NONE"),
        ("DBCache", "DBCache"), ("dual_block_cache", "DBCache"), ("db_cache", "DBCache"), ("db", "DBCache"),
        ("DBPrune", "DBPrune"), ("dynamic_block_prune", "DBPrune"), ("db_prune", "DBPrune"), ("dbp", "DBPrune"),
        ("TeaCache", "TeaCache"), ("tea_cache", "TeaCache"),
    ],
)  # fmt: skip
def test_names_stand_for_types(name, member):
    assert cache_type(name) is CacheType(member) is cache_type(CacheType(member))


@pytest.mark.parametrize("member", CacheType)
def test_every_type_has_its_own_name(member):
    assert cache_type(str(member)) is member


def test_names_that_stand_for_none():
    with pytest.raises(ValueError, match=r"type_hint must be one of NONE, .*DBCACHE, .*, got 'fbcache'"):
        cache_type("fbcache")
    with pytest.raises(TypeError, match="type_hint must be a CacheType or a name, got 3"):
        cache_type(3)


@pytest.mark.parametrize(
    ("arguments", "blocks"),
    [
        ((0, 10, 4), [0, 4, 8, 9]),
        ((3, 10, 3), [0, 3, 6, 9]),
        ((5, 5, 2), [0, 4]),
        ((0, 1, 2), [0]),
        ((0, 10), []),
        ((0, 10, 0), []),
        ((0, 0, 2), []),
        ((6, 5, 2), []),
    ],
)
def test_block_range(arguments, blocks):
    assert block_range(*arguments) == blocks
