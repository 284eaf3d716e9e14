"""Page tables of batches whose pages lie scattered in the pool."""

from __future__ import annotations

import numpy as np

from radixkv.attention import PageTable

PAGE_SIZE = 16


def table_of(batch: int, length: int, rows: int = 1, shared: int = 0) -> tuple[PageTable, int]:
    """Requests of `length` tokens, the last `rows` of them new, and the pages of the pool.

    The first `shared` tokens, whole pages, are the same for all.
    """
    common, pages = shared // PAGE_SIZE, -(-length // PAGE_SIZE)
    own = pages - common
    num_pages = common + batch * own
    order = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    each = [np.concatenate([order[:common], order[common + b * own : common + (b + 1) * own]]) for b in range(batch)]
    position = np.arange(length - rows, length)
    table = PageTable(
        qo_indptr=np.arange(0, batch * rows + 1, rows, dtype=np.int32),
        kv_indptr=np.arange(0, batch * pages + 1, pages, dtype=np.int32),
        kv_indices=np.concatenate(each),
        kv_last_page_len=np.full(batch, (length - 1) % PAGE_SIZE + 1, dtype=np.int32),
        slots=np.concatenate([mine[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE for mine in each]).astype(
            np.int32
        ),
    )
    return table, num_pages
