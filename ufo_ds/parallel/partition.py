"""Multiway number partitioning: items with loads are spread over parts so that all parts weigh the same."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

EVEN = Fraction(102, 100)  # a largest load of at most so many times the mean counts as even
SLACK = Fraction(1, 100)  # what more of the mean counts as the same where even is out of reach
NODES = 20_000  # of one search, a fraction of a second


def partition(loads: Sequence[int], parts: int) -> list[list[int]]:
    """Spread items over parts, the same way whenever and wherever it is called.

    The objective: the largest load of a part is at most :data:`EVEN` times the mean, or at most :data:`SLACK` of the
    mean above the smallest possible; then as few items as possible in the fullest part; then as small a largest load as
    possible.

    Longest processing time first (Graham, 1969, Bounds on multiprocessing timing anomalies) gives the start, the
    complete greedy algorithm (Korf, 1998, A complete anytime algorithm for number partitioning) what is better. Exact
    unless a search ends after :data:`NODES` nodes, and never worse than the start.

    Returns:
        The items of every part, in descending order of load. Parts come in the order of their first items, empty ones
        last.
    """
    order = sorted(range(len(loads)), key=lambda i: (-loads[i], i))
    weights = [loads[i] for i in order]
    chosen = longest_first(weights, parts)
    chosen = _search(weights, parts, len(weights), max(sums(weights, chosen, parts)) - 1) or chosen
    mean = Fraction(sum(weights), parts)
    bound = int(max(EVEN * mean, max(sums(weights, chosen, parts)) + SLACK * mean))
    fullest = max(chosen.count(part) for part in range(parts))
    for slots in range(-(-len(weights) // parts), fullest):
        if (fewer := _search(weights, parts, slots, bound)) is not None:
            chosen = fewer
            break
    members = [[i for i, part in zip(order, chosen, strict=True) if part == p] for p in range(parts)]
    return sorted(members, key=lambda items: min(items, default=len(loads)))


def longest_first(weights: Sequence[int], parts: int) -> list[int]:
    """The part of each item where they go, in their order, to the part with the smallest load."""
    loads, chosen = [0] * parts, []
    for weight in weights:
        chosen.append(loads.index(min(loads)))
        loads[chosen[-1]] += weight
    return chosen


def sums(weights: Sequence[int], chosen: Sequence[int], parts: int) -> list[int]:
    """The load of every part."""
    loads = [0] * parts
    for weight, part in zip(weights, chosen, strict=True):
        loads[part] += weight
    return loads


def _search(weights: Sequence[int], parts: int, slots: int, bound: int) -> list[int] | None:
    """The part of each item, at most ``slots`` items in a part and at most ``bound`` load, as small as can be found.

    Args:
        weights: in descending order.
    """
    rest = [*accumulate(reversed(weights), initial=0)][::-1]  # of the items from the i-th on
    least = max(-(-rest[0] // parts), weights[0])
    loads, counts, chosen = [0] * parts, [0] * parts, [0] * len(weights)
    best, nodes = None, NODES

    def visit(i: int) -> None:
        nonlocal best, bound, nodes
        nodes -= 1
        if nodes < 0 or bound < least:
            return
        if i == len(weights):
            best, bound = chosen.copy(), max(loads) - 1
            return
        if sum(bound - load for load, count in zip(loads, counts, strict=True) if count < slots) < rest[i]:
            return
        # Of parts that are alike only the first is tried, and equal items are not exchanged: a solution's smallest
        # numbering breaks neither rule.
        lowest = chosen[i - 1] if i and weights[i] == weights[i - 1] else 0
        seen = set()
        for part in sorted(range(parts), key=loads.__getitem__):
            state = (loads[part], counts[part])
            if state in seen:
                continue
            seen.add(state)
            if part < lowest or counts[part] == slots or loads[part] + weights[i] > bound:
                continue
            loads[part] += weights[i]
            counts[part] += 1
            chosen[i] = part
            visit(i + 1)
            loads[part] -= weights[i]
            counts[part] -= 1

    visit(0)
    return best
