"""Draws of rows by hashes of what they say: the same whatever the order of a file or a seed.

Rows are drawn in an order of which every start has the subsets in the shares that they have in the
whole, to about a row. So a smaller draw is a part of a larger one. Within a subset, the rows of a
prompt follow each other where they are trained on, as they are then read together. Where they are
held out, each prompt has its first row before any has its second: pairs of one prompt are alike, so
as many of other prompts measure more. A prompt of several subsets has its rows in several places.
"""

import numpy as np

# Prompts that validation and test must have each, for held-out prompts to be divided into the two.
FEWEST_IN_HALF = 8


def order(
    prompts: np.ndarray,
    rows: np.ndarray,
    strata: np.ndarray,
    sizes: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    *,
    held_out: bool = False,
) -> np.ndarray:
    """Return the order in which rows are drawn, as indices.

    prompts, rows: hashes [R] of a row's prompt and of the whole row. strata: what tells its subset
    [R]. sizes: examples of each row; None: one. scale: how much more often each row's stratum comes
    up than its rows alone make it [R]; None: 1. held_out: whether a subset's prompts come once each
    before any comes again.
    """
    count = len(prompts)
    if sizes is None:
        sizes = np.ones(count, int)
    _, number_R = np.unique(strata, return_inverse=True)
    total_S = np.bincount(number_R, sizes)
    # By stratum, in it by prompt, and in that by row.
    sorted_R = np.lexsort((rows, prompts, number_R))
    if held_out:
        turn_R = _turns(sorted_R, number_R, prompts)
        sorted_R = np.lexsort((rows, prompts, turn_R, number_R))
    before_R = np.cumsum(sizes[sorted_R]) - sizes[sorted_R]
    stratum_R = number_R[sorted_R]
    start_S = np.concatenate([[0], np.cumsum(total_S)[:-1]]) if count else np.zeros(0)
    # Where in its stratum the middle of a row lies, from 0 to 1.
    middle_R = before_R - start_S[stratum_R] + sizes[sorted_R] / 2
    place_R = np.empty(count)
    place_R[sorted_R] = middle_R / total_S[stratum_R]
    if scale is not None:
        place_R = place_R / scale
    return np.lexsort((rows, prompts, place_R))


def _turns(order_R: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """Return how many rows that are equal to it in some columns come before each row [R].

    order_R: an order in which equal rows follow each other.
    """
    is_first = np.zeros(len(order_R), bool)
    is_first[:1] = True
    for column in columns:
        in_order = column[order_R]
        is_first[1:] |= in_order[1:] != in_order[:-1]
    starts = np.flatnonzero(is_first)
    turn_R = np.empty(len(order_R), int)
    turn_R[order_R] = np.arange(len(order_R)) - starts[np.cumsum(is_first) - 1]
    return turn_R


def drawn(order_R: np.ndarray, sizes: np.ndarray, most: int) -> np.ndarray:
    """Return which rows are drawn, bool [R]: the first in order that make `most` examples; 0: all.

    The last one may have more pairs than are left.
    """
    if not most:
        return np.ones(len(order_R), bool)
    sizes_in_order = sizes[order_R]
    is_drawn_R = np.empty(len(order_R), bool)
    is_drawn_R[order_R] = np.cumsum(sizes_in_order) - sizes_in_order < most
    return is_drawn_R


def are_test(prompts: np.ndarray) -> np.ndarray:
    """Return which held-out prompts are of the test half, by their hashes; the others validate.

    Of few prompts none is. The lowest bit decides: whether a prompt is held out depends on the
    highest, and so does the order in which prompts are drawn.
    """
    is_test = prompts & np.uint64(1) == 1
    in_test = len(np.unique(prompts[is_test]))
    in_validation = len(np.unique(prompts[~is_test]))
    if min(in_test, in_validation) < FEWEST_IN_HALF:
        return np.zeros(len(prompts), bool)
    return is_test


def spread(prompts: np.ndarray, strata: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of `count` rows to take a prompt from, in their own order.

    Different prompts come before a second row of any prompt, and strata in their shares.
    """
    if count >= len(prompts):
        return np.arange(len(prompts))
    turn_R = _turns(np.argsort(prompts, kind="stable"), prompts)
    chosen = []
    for turn in range(turn_R.max() + 1):
        index = np.flatnonzero(turn_R == turn)
        in_order = order(prompts[index], index, strata[index])
        chosen.extend(index[in_order].tolist())
        if len(chosen) >= count:
            break
    return np.sort(chosen[:count])
