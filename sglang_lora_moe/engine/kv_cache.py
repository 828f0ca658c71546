"""Pages of the KV cache, and the prefix cache over them. Host only: page numbers, no tensors.

A page holds `page_size` consecutive tokens of one request in every layer. Page 0 is the dump page: padding rows write
there and no request ever owns it. Every other page is in exactly one of three states,

    free      nobody knows its content
    in use    at least one request holds it (reference count > 0); full pages may also be known to the prefix cache
    cached    no request holds it, but the prefix cache knows its content and may hand it out again, or evict it

so `free + cached + in use == total`, which `tests/books.py` asserts. The content of a full page is named by a hash chain:

    key(root) = the adapter's revision, or "base";   key(page) = hash(key(parent), tokens of the page)

so equal prefixes share pages and a prefix never crosses adapters. Slots never enter a key.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import takewhile


def root_key(revision: str | None) -> bytes:
    """Parent key of the first page of a request that runs under an adapter revision (None = base model)."""
    return hashlib.blake2b((revision or "base").encode(), digest_size=32).digest()


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a full page. A cryptographic hash: two prompts must never share a page by accident or by intent."""
    return hashlib.blake2b(array("q", tokens).tobytes(), key=parent, digest_size=32).digest()


class PagePool:
    """Reference counts of `num_pages` pages (page 0 included) and the list of free ones."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"a KV cache needs at least 2 pages (page 0 is the dump page), got {num_pages}")
        self.total = num_pages - 1  # pages that requests can own
        self.refs = [0] * num_pages
        self.free = list(range(num_pages - 1, 0, -1))  # a stack, lowest page on top

    def take(self) -> int:
        page = self.free.pop()
        assert self.refs[page] == 0, f"free page {page} has {self.refs[page]} references"
        self.refs[page] = 1
        return page

    def give(self, page: int) -> None:
        assert page > 0 and self.refs[page] == 0, f"page {page} with {self.refs[page]} references given back"
        self.free.append(page)


class PrefixCache:
    """Allocates pages, shares those of equal prefixes and evicts the least recently used ones nobody holds."""

    def __init__(self, pool: PagePool, page_size: int, enabled: bool = True) -> None:
        self.pool, self.page_size, self.enabled = pool, page_size, enabled
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached pages, least recently used first

    @property
    def num_cached(self) -> int:
        return len(self._idle)

    @property
    def num_in_use(self) -> int:
        return self.pool.total - len(self.pool.free) - len(self._idle)

    @property
    def available(self) -> int:
        """Pages that `allocate` can give now, evicting whatever is cached."""
        return len(self.pool.free) + len(self._idle)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Pages of the longest known prefix of a key chain. Takes no references; follow with `hold` before allocating."""
        return [self._page_of[key] for key in takewhile(self._page_of.__contains__, keys)]

    def idle_among(self, pages: Iterable[int]) -> int:
        """How many of `pages` nobody holds: holding them takes them out of `available`."""
        return sum(page in self._idle for page in pages)

    def hold(self, pages: Iterable[int]) -> None:
        refs = self.pool.refs
        for page in pages:
            if refs[page] == 0:
                del self._idle[page]
            refs[page] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` fresh pages, held once each; the caller has checked `available`."""
        assert count <= self.available, f"{count} pages wanted, {self.available} available"
        while len(self.pool.free) < count:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
            self.pool.give(page)
        return [self.pool.take() for _ in range(count)]

    def insert(self, key: bytes, page: int) -> None:
        """Make the content of a full, held page known. A second page of equal content stays private to its request."""
        assert self.pool.refs[page] > 0, f"page {page} inserted while nobody holds it"
        if self.enabled and key not in self._page_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference of each page of a request, in the request's order.

        The last pages become idle first: a page is useless without those before it, so the tail must be evicted first.
        """
        refs = self.pool.refs
        for page in reversed(pages):
            assert refs[page] > 0, f"page {page} released while nobody holds it"
            refs[page] -= 1
            if refs[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self.pool.give(page)

    def flush(self) -> int:
        """Forget all content; pages in use stay with their requests. Returns how many pages were known."""
        known = len(self._key_of)
        for page in self._idle:
            self.pool.give(page)
        self._idle.clear()
        self._page_of.clear()
        self._key_of.clear()
        return known
