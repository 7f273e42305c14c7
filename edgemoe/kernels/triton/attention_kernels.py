"""Kernels of attention for passes of few tokens. Importing this needs Triton.

Every length, address and path comes from one int64 tensor on the device, whose parts `pass_layout.py` describes: a
graph of these kernels can be replayed for any sequences. All sums have one order: keys are taken by their place in the
sequence, in blocks and splits that begin at fixed places, so a token's result depends on the keys it sees alone.
"""

# Triton reads the annotations of a kernel as part of it, and knows of none but `constexpr`.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from edgemoe.kernels.triton.language import constexpr, tl, triton


def _buffer(place, kind: constexpr):
    """The buffer of `kind` whose address is at `place`. Triton loads 16 bytes at once if told of alignment."""
    return tl.multiple_of(tl.load(place).to(tl.pointer_type(kind)), 16)


buffer_at = triton.jit(_buffer)


def _append(
    key,
    value,
    metadata,
    tokens,
    table,
    key_token,
    key_head,
    key_column,
    value_token,
    value_head,
    value_column,
    width: constexpr,
    value_width: constexpr,
    width_block: constexpr,
    value_block: constexpr,
):
    """Stores key and value of one token and head in the buffers of the token's sequence."""
    token, head = tl.program_id(0), tl.program_id(1)
    if token >= tl.load(metadata + 3 * tokens):
        return
    place = metadata + table + token * 4
    row = tl.load(metadata + 2 * tokens + token) - tl.load(place + 3)
    at = head * tl.load(place + 2) + row
    column = tl.arange(0, width_block)
    found = tl.load(key + token * key_token + head * key_head + column * key_column, mask=column < width)
    keys = buffer_at(place, key.dtype.element_ty)
    tl.store(keys + at * width + column, found, mask=column < width)
    column = tl.arange(0, value_block)
    found = tl.load(value + token * value_token + head * value_head + column * value_column, mask=column < value_width)
    values = buffer_at(place + 1, value.dtype.element_ty)
    tl.store(values + at * value_width + column, found, mask=column < value_width)


def _range(metadata, tokens, place, token, window: constexpr):
    """The first key that `token` sees, and the end, as places in its sequence; the end is 0 for padding."""
    end = tl.where(token < tl.load(metadata + 3 * tokens), tl.load(metadata + token) + 1, 0)
    begin = tl.load(place + 3)
    if window:
        begin = tl.maximum(begin, end - window)
    return begin, end


range_of = triton.jit(_range)


def _rows(metadata, tokens, token, seen, inside, drafted: constexpr):
    """The rows, counted from the sequence's first token, of its keys `seen` where `inside`."""
    base = tl.load(metadata + tokens + token)
    deep = seen - base
    fresh = inside & (deep >= 0)
    path = metadata + 3 * tokens + 1 + token * drafted
    return tl.where(fresh, base + tl.load(path + deep, mask=fresh, other=0), seen)


def _spread(query, row, inside, row_step, column_step, width: constexpr, block: constexpr):
    """As `_tile`, of a tensor of any strides."""
    column = tl.arange(0, block)
    mask = inside[:, None] & (column < width)[None, :]
    return tl.load(query + row[:, None] * row_step + column[None, :] * column_step, mask=mask, other=0.0)


def _tile(buffer, row, inside, width: constexpr, block: constexpr):
    """Rows of a buffer, [rows, block], with zeros beyond `width` and where not `inside`."""
    column = tl.arange(0, block)
    mask = inside[:, None] & (column < width)[None, :]
    return tl.load(buffer + row[:, None] * width + column[None, :], mask=mask, other=0.0)


def _scores(query, keys, inside, scaling: constexpr, softcap: constexpr):
    """The scores of `query` [heads, width] and `keys` [block, width] in float32, -inf where not `inside`."""
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scaling
    if softcap > 0:
        # tanh by the sigmoid, which every device and the interpreter has.
        scores = softcap * (2 * tl.sigmoid(scores * (2 / softcap)) - 1)
    return tl.where(inside[None, :], scores, float("-inf"))


def _store_split(partial, stats, to, total, largest, weight, mask, width: constexpr, block: constexpr):
    """Stores what one split gives to the heads at `to` where `mask`."""
    column = tl.arange(0, block)
    tl.store(partial + to[:, None] * width + column[None, :], total, mask=mask[:, None] & (column < width)[None, :])
    tl.store(stats + to * 2, largest, mask=mask)
    tl.store(stats + to * 2 + 1, weight, mask=mask)


rows_of = triton.jit(_rows)
spread_of = triton.jit(_spread)
tile_of = triton.jit(_tile)
scores_of = triton.jit(_scores)
store_split = triton.jit(_store_split)


def _attend(
    query,
    partial,
    stats,
    metadata,
    tokens,
    table,
    query_token,
    query_head,
    query_column,
    shape: constexpr,
    blocks: constexpr,
    scaling: constexpr,
    softcap: constexpr,
    window: constexpr,
    split: constexpr,
    drafted: constexpr,
):
    """The sum of values, not yet divided, largest score and sum of exponentials of one token, split and head of keys.

    `shape` is query heads for each head of keys, width and value width, and `blocks` the same as tiles, and their keys.
    """
    token, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = metadata + table + token * 4
    begin, end = range_of(metadata, tokens, place, token, window)
    first = (begin // split + part) * split
    if first >= end:
        return
    kind = query.dtype.element_ty
    head_row = head * tl.load(place + 2) - tl.load(place + 3)
    keys, values = buffer_at(place, kind), buffer_at(place + 1, kind)
    heads = (head * shape[0] + tl.arange(0, blocks[0])).to(tl.int64)
    mine = heads < (head + 1) * shape[0]
    asked = spread_of(query + token * query_token, heads, mine, query_head, query_column, shape[1], blocks[1])
    # Finite, since a window may begin behind the first block: then nothing changes, where -inf - -inf is not a number.
    largest, weight = tl.full((blocks[0],), -1e38, tl.float32), tl.full((blocks[0],), 0.0, tl.float32)
    total = tl.full((blocks[0], blocks[2]), 0.0, tl.float32)
    for start in range(0, split, blocks[3]):
        seen = first + start + tl.arange(0, blocks[3])
        inside = (seen >= begin) & (seen < end)
        row = head_row + rows_of(metadata, tokens, token, seen, inside, drafted)
        scores = scores_of(asked, tile_of(keys, row, inside, shape[1], blocks[1]), inside, scaling, softcap)
        higher = tl.maximum(largest, tl.max(scores, 1))
        shares, shrink = tl.exp(scores - higher[:, None]), tl.exp(largest - higher)
        found = tile_of(values, row, inside, shape[2], blocks[2])
        weight = weight * shrink + tl.sum(shares, 1)
        total = total * shrink[:, None] + tl.dot(shares.to(kind), found, input_precision="ieee")
        largest = higher
    to = (token.to(tl.int64) * tl.num_programs(1) * shape[0] + heads) * tl.num_programs(2) + part
    store_split(partial, stats, to, total, largest, weight, mine, shape[2], blocks[2])


def _combine(
    partial,
    stats,
    sinks,
    output,
    metadata,
    tokens,
    table,
    has_sinks: constexpr,
    window: constexpr,
    value_width: constexpr,
    value_block: constexpr,
    split: constexpr,
    splits: constexpr,
    block: constexpr,
):
    """One token's and head's output from the results of its splits; 0 for padding."""
    token, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, value_block)
    row = token.to(tl.int64) * tl.num_programs(1) + head
    to = output + row * value_width + column
    kind = output.dtype.element_ty
    begin, end = range_of(metadata, tokens, metadata + table + token * 4, token, window)
    if end == 0:
        tl.store(to, tl.zeros((value_block,), kind), mask=column < value_width)
        return
    count = (end - 1) // split - begin // split + 1
    largest, weight = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    if has_sinks:
        # The sink is a score without a value.
        largest, weight = tl.load(sinks + head).to(tl.float32), tl.full((), 1.0, tl.float32)
    total = tl.zeros((value_block,), tl.float32)
    for start in range(0, splits, block):
        part = start + tl.arange(0, block)
        at = row * splits + part
        scores = tl.load(stats + at * 2, mask=part < count, other=float("-inf"))
        weights = tl.load(stats + at * 2 + 1, mask=part < count, other=0.0)
        higher = tl.maximum(largest, tl.max(scores, 0))
        shrink, shares = tl.exp(largest - higher), tl.exp(scores - higher)
        mask = (part < count)[:, None] & (column < value_width)[None, :]
        found = tl.load(partial + at[:, None] * value_width + column[None, :], mask=mask, other=0.0)
        weight = weight * shrink + tl.sum(shares * weights, 0)
        total = total * shrink + tl.sum(shares[:, None] * found, 0)
        largest = higher
    tl.store(to, (total / weight).to(kind), mask=column < value_width)


# A pass of one token is compiled as any other.
_RUNTIME = ["tokens", "table"]
append = triton.jit(_append, do_not_specialize=_RUNTIME)
attend = triton.jit(_attend, do_not_specialize=_RUNTIME)
combine = triton.jit(_combine, do_not_specialize=_RUNTIME)
