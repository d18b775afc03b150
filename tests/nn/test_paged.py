"""The plain twin of paged attention: equal to attention over each sequence by itself, wherever its blocks lie."""

import pytest
import torch

from modelwright.nn.attention import AttentionRule, attend_plain
from modelwright.nn.paged import Cache, Pages, TileGroup, attend_pages, tile_span, write_pages

BLOCK, HEADS, KEY, VALUE, SCALE = 4, (6, 2), 8, 10, 0.3
RULES = [AttentionRule(), AttentionRule(window=7), AttentionRule(softcap=2.0), AttentionRule(sinks=torch.arange(6.0))]


@pytest.mark.parametrize("rule", RULES)
def test_equals_attention_over_each_sequence(rule: AttentionRule):
    torch.manual_seed(0)
    chunks, span = [(0, 9), (21, 1), (5, 7)], tile_span(HEADS[0] // HEADS[1])
    cache = Cache(torch.full((30 * BLOCK, HEADS[1], KEY + VALUE), float("nan")), BLOCK, KEY)
    free = (torch.randperm(29) + 1).tolist()
    q, tables, tiles, slots, expected = [], [], [], [], []
    for start, num in chunks:
        table = [free.pop() for _ in range(-(-(start + num) // BLOCK))]
        at = torch.tensor([table[s // BLOCK] * BLOCK + s % BLOCK for s in range(start + num)])
        k, v = torch.randn(start + num, HEADS[1], KEY), torch.randn(start + num, HEADS[1], VALUE)
        write_pages(cache, k[:start], v[:start], at[:start])  # of steps before
        rows = torch.randn(start + num, HEADS[0], KEY)
        expected.append(attend_plain(rows[None], k[None], v[None], scale=SCALE, is_causal=True, rule=rule)[0, start:])
        for i in range(0, num, span):
            tiles.append((len(slots) + i, min(span, num - i), len(tables), start + i, 0))
        slots, tables = slots + at[start:].tolist(), tables + table
        q.append((rows[start:], k[start:], v[start:]))
    queries, keys, values = (torch.cat(x) for x in zip(*q, strict=True))
    pages = Pages(torch.tensor(slots), torch.tensor(tables), (TileGroup(torch.tensor(tiles), span),), 22)
    write_pages(cache, keys, values, pages.slots)
    found = attend_pages(queries, cache, pages, scale=SCALE, rule=rule)
    assert torch.allclose(found, torch.cat(expected), atol=1e-6)
