"""Pack conversations into rows of a fixed length, several to a row, none of them cut.

Best fit, decreasing: the longest conversation first, each into the fullest row that still has room. Done window by
window over a shuffled order, so that rows mix lengths and sources and the work is linear in their number.

    lengths [5, 3, 2, 4], capacity 8   ->   rows [[0, 1], [3, 2]] of 8 and 6 tokens
"""

import bisect
from collections.abc import Iterator

import numpy as np


def pack(lengths: np.ndarray, capacity: int, *, window: int, seed: int) -> list[list[int]]:
    """Indices of `lengths` by row; each index in exactly one row, no row longer than `capacity`."""
    return [row for rows in windows(lengths, capacity, window=window, seed=seed) for row in rows]


def windows(lengths: np.ndarray, capacity: int, *, window: int, seed: int) -> Iterator[list[list[int]]]:
    """The rows of one window after the other.

    A pure function of its arguments. Raises ValueError when one is longer than a row: the length policy comes before.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a conversation of {lengths.max()} tokens does not fit a row of {capacity}")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(lengths))
    for start in range(0, len(order), window):
        yield best_fit(order[start : start + window], lengths, capacity)


def best_fit(indices: np.ndarray, lengths: np.ndarray, capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    rooms: list[int] = []  # the distinct free lengths of open rows, ascending
    with_room: dict[int, list[int]] = {}  # free length -> rows that have it
    for index in indices[np.argsort(-lengths[indices], kind="stable")].tolist():
        length = int(lengths[index])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(index)
        left = room - length
        if left:
            if left not in with_room:
                with_room[left] = []
                bisect.insort(rooms, left)
            with_room[left].append(row)
    return rows
