"""The page pool: which pages are free, and how many tables name each of the others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from jax_mla.checks.sizes import check_positive


class PagePool:
    """Reference counts of all pages, and the free ones in the order in which they are reused.

    Args:
      on_reuse: called with a page that is handed out for new rows: what it held is lost.

    Attributes:
      references: of each page, how often it is held. A page is free at 0.
    """

    def __init__(self, num_pages: int, on_reuse: Callable[[int], None] = lambda page: None):
        check_positive(num_pages=num_pages)
        self.references = [0] * num_pages
        self._on_reuse = on_reuse
        # Released last, reused last. (A dict finds its first key slowly after many deletions.)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self.references) - len(self._free)

    def is_free(self, page: int) -> bool:
        return page in self._free

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, each held once; None, and nothing changes, if fewer are free."""
        if count > self.num_free:
            return None
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self.references[page] = 1
            self._on_reuse(page)
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """Holds each page once more; a free one is taken as it is, with what it holds."""
        for page in pages:
            self._free.pop(page, None)
            self.references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Holds each page once less. Of a table the last page is reused first.

        Raises:
          ValueError: a page is free already.
        """
        for page in reversed(pages):
            if self.references[page] == 0:
                raise ValueError(f"a page must be held to be released, page {page} is free")
            self.references[page] -= 1
            if self.references[page] == 0:
                self._free[page] = None
