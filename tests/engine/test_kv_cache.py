"""Pages and the prefix cache: the books, the hash chain, eviction order."""

import random

import pytest

from sglang_lora_moe.engine.kv_cache import PagePool, PrefixCache, page_key, root_key
from tests.books import check_cache


def chain(tokens: list[int], page_size: int, revision: str | None = None) -> list[bytes]:
    keys = [root_key(revision)]
    for i in range(len(tokens) // page_size):
        keys.append(page_key(keys[-1], tokens[i * page_size : (i + 1) * page_size]))
    return keys[1:]


def test_keys_depend_on_the_whole_prefix_and_on_the_revision() -> None:
    base, other = chain(list(range(8)), 4), chain(list(range(8)), 4, "a" * 64)
    assert not set(base) & set(other)
    assert chain([9, 1, 2, 3, 4, 5, 6, 7], 4)[1] != base[1]
    assert chain(list(range(8)), 4) == base
    assert page_key(base[0], [1, 2]) != page_key(base[0], [2, 1]) and len(base[0]) == 32  # bytes: nobody finds two prompts of one key
    assert root_key("b" * 70 + "1") != root_key("b" * 70 + "2")


def test_page_zero_is_never_given() -> None:
    cache = PrefixCache(PagePool(9), 4)
    assert sorted(cache.allocate(8)) == list(range(1, 9))
    with pytest.raises(AssertionError, match="1 pages wanted, 0 available"):
        cache.allocate(1)
    with pytest.raises(ValueError, match="at least 2 pages"):
        PagePool(1)


def test_shared_pages_are_counted_and_kept() -> None:
    cache = PrefixCache(PagePool(9), 4)
    keys = chain(list(range(12)), 4)
    pages = cache.allocate(3)
    for key, page in zip(keys, pages, strict=True):
        cache.insert(key, page)
    cache.release(pages)
    assert (cache.num_cached, cache.num_in_use, len(cache.pool.free)) == (3, 0, 5)
    assert cache.match(keys) == pages
    assert cache.match(chain(list(range(8)) + [0, 0, 0, 0], 4)) == pages[:2]
    cache.hold(pages[:2])
    cache.hold(pages[:2])
    assert (cache.num_cached, cache.num_in_use) == (1, 2)
    cache.release(pages[:2])
    assert cache.num_in_use == 2
    cache.release(pages[:2])
    check_cache(cache)
    assert cache.num_in_use == 0


def test_eviction_takes_the_least_recently_used_tail_first() -> None:
    cache = PrefixCache(PagePool(7), 4)
    first, second = chain([1] * 12, 4), chain([2] * 12, 4)
    for keys in (first, second):
        pages = cache.allocate(3)
        for key, page in zip(keys, pages, strict=True):
            cache.insert(key, page)
        cache.release(pages)
    held = cache.match(first)  # used again: now more recent than the second
    cache.hold(held)
    cache.release(held)
    cache.allocate(2)
    assert len(cache.match(first)) == 3 and len(cache.match(second)) == 1
    check_cache(cache)


def test_equal_content_twice_keeps_the_second_page_private() -> None:
    cache = PrefixCache(PagePool(5), 4)
    (key,) = chain([1, 2, 3, 4], 4)
    one, two = cache.allocate(2)
    cache.insert(key, one)
    cache.insert(key, two)
    cache.release([two])
    cache.release([one])
    assert (cache.num_cached, len(cache.pool.free)) == (1, 3)
    check_cache(cache)


def test_flush_keeps_pages_in_use() -> None:
    cache = PrefixCache(PagePool(5), 2)
    keys = chain([1, 2, 3, 4], 2)
    pages = cache.allocate(2)
    for key, page in zip(keys, pages, strict=True):
        cache.insert(key, page)
    cache.release(pages[1:])
    assert cache.flush() == 2
    assert (cache.num_cached, cache.num_in_use) == (0, 1) and cache.match(keys) == []
    check_cache(cache)
    cache.release(pages[:1])
    assert len(cache.pool.free) == 4


def test_disabled_cache_knows_nothing() -> None:
    cache = PrefixCache(PagePool(5), 2, enabled=False)
    (page,) = cache.allocate(1)
    (key,) = chain([1, 2], 2)
    cache.insert(key, page)
    cache.release([page])
    assert cache.match([key]) == [] and cache.num_cached == 0


def test_books_hold_under_random_use() -> None:
    rng = random.Random(0)
    cache = PrefixCache(PagePool(33), 2)
    held: list[list[int]] = []
    for _ in range(3000):
        if held and (rng.random() < 0.5 or cache.available < 6):
            cache.release(held.pop(rng.randrange(len(held))))
        elif cache.available >= 6:
            keys = chain([rng.randrange(2) for _ in range(rng.randrange(2, 12))], 2)
            matched = cache.match(keys)
            fresh = len(keys) - len(matched)
            if fresh + cache.idle_among(matched) > cache.available:
                continue
            cache.hold(matched)
            pages = matched + cache.allocate(fresh)
            for key, page in zip(keys, pages, strict=True):
                cache.insert(key, page)
            held.append(pages)
        if rng.random() < 0.01:
            cache.flush()
        check_cache(cache)
    for pages in held:
        cache.release(pages)
    check_cache(cache)
    assert cache.num_in_use == 0
