"""The block pool: nothing leaks, nothing is shared in error, old prefixes are forgotten first."""

import pytest

from modelwright.engine.kv_cache import BlockPool, block_hash, root_hash

ROOT = root_hash()


def fill(pool: BlockPool, tokens: list[int], root: bytes = ROOT) -> list[int]:
    """Take blocks for a sequence and remember the full ones, as a finished prefill does."""
    shared = pool.find_prefix(tokens, root)
    pool.hold(shared)
    blocks = [*shared, *pool.take(-(-len(tokens) // pool.block_size) - len(shared))]
    parent = root
    for i in range(len(tokens) // pool.block_size):
        parent = pool.remember(blocks[i], parent, tokens[i * pool.block_size : (i + 1) * pool.block_size])
    return blocks


def test_prefix_is_found_in_whole_blocks_and_never_in_full():
    pool = BlockPool(16, block_size=4)
    blocks = fill(pool, list(range(12)))
    assert pool.find_prefix(list(range(12)), ROOT) == blocks[:2]  # the last token is left to compute
    assert pool.find_prefix(list(range(13)), ROOT) == blocks
    assert pool.find_prefix(list(range(7)), ROOT) == blocks[:1]
    assert pool.find_prefix([0, 1, 2, 9, 4, 5, 6, 7, 8], ROOT) == []
    assert pool.find_prefix([4, 5, 6, 7, 8], ROOT) == []  # the same tokens elsewhere are another block


def test_switched_off_it_finds_nothing():
    pool = BlockPool(16, block_size=4, has_prefix_cache=False)
    fill(pool, list(range(12)))
    assert pool.find_prefix(list(range(12)), ROOT) == []


def test_tags_separate_and_their_names_count():
    roots = [root_hash(t) for t in ({}, {"adapter": "S"}, {"tenant": "S"}, {"adapter": "S", "tenant": ""})]
    assert len(set(roots)) == 4
    assert root_hash({"a": "bc"}) != root_hash({"ab": "c"})
    pool = BlockPool(16, block_size=4)
    fill(pool, list(range(8)), roots[1])
    assert pool.find_prefix(list(range(9)), roots[2]) == []
    assert len(pool.find_prefix(list(range(9)), roots[1])) == 2


def test_a_hash_collision_is_not_believed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("modelwright.engine.kv_cache.block_hash", lambda parent, tokens: b"same")
    pool = BlockPool(16, block_size=4)
    fill(pool, [1, 2, 3, 4, 5])
    assert pool.find_prefix([9, 9, 9, 9, 9], ROOT) == []
    assert len(pool.find_prefix([1, 2, 3, 4, 9], ROOT)) == 1


def test_released_blocks_serve_until_taken_and_tails_go_first():
    pool = BlockPool(1 + 4, block_size=2)
    blocks = fill(pool, [1, 2, 3, 4, 5, 6])
    pool.release(blocks)
    pool.check([])
    assert pool.num_free == 4 and pool.find_prefix([1, 2, 3, 4, 5, 6, 7], ROOT) == blocks
    taken = pool.take(2)  # the one never used, then the last of the sequence
    assert taken[1] == blocks[2]
    assert pool.find_prefix([1, 2, 3, 4, 5, 6, 7], ROOT) == blocks[:2]
    pool.check([taken])


def test_least_recently_used_prefix_is_forgotten_first():
    pool = BlockPool(1 + 2, block_size=2)
    old, young = fill(pool, [1, 2]), fill(pool, [3, 4])
    pool.release(old)
    pool.release(young)
    pool.hold(old)
    pool.release(old)  # used again
    assert pool.take(1) == young


def test_shared_blocks_outlive_one_holder():
    pool = BlockPool(8, block_size=2)
    first = fill(pool, [1, 2, 3, 4])
    second = fill(pool, [1, 2, 9, 9])
    assert second[0] == first[0] and second[1] != first[1]
    pool.release(first)
    pool.check([second])
    assert second[0] not in pool.take(pool.num_free)


def test_can_take_does_not_count_free_blocks_that_are_about_to_be_shared():
    pool = BlockPool(1 + 3, block_size=2)
    blocks = fill(pool, [1, 2, 3, 4])
    pool.release(blocks)
    assert pool.can_take(3) and not pool.can_take(3, shared=blocks[:1]) and pool.can_take(2, shared=blocks[:1])


def test_double_release_is_caught():
    pool = BlockPool(4, block_size=2)
    blocks = pool.take(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)


def test_forget_all_empties_the_memory_of_prefixes():
    pool = BlockPool(8, block_size=2)
    blocks = fill(pool, [1, 2, 3, 4])
    pool.forget_all()
    assert pool.find_prefix([1, 2, 3], ROOT) == []
    pool.release(blocks)
    pool.check([])


def test_hashes_chain():
    assert block_hash(ROOT, [1, 2]) != block_hash(block_hash(ROOT, [0, 0]), [1, 2])
    assert block_hash(ROOT, [1, 2]) == block_hash(ROOT, (1, 2))


def test_a_pool_that_holds_nothing_is_refused():
    with pytest.raises(ValueError, match="holds nothing"):
        BlockPool(1, block_size=4)
