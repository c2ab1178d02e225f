"""Labels of tensor axes and the constraints between them: union-find with refinement.

The label of an axis is a sequence of (block, repeat): consecutive indices that belong to the
channels of a `Block`, each ``repeat`` indices wide; an axis without a label (None) has fixed
positions. Tying two axes says that their channels move together: equal blocks merge, unequal ones
are cut at each other's boundaries, and a block whose indices turn out to be ``k`` wide channels (a
Linear after a flatten) is replaced by those channels.

Invariant: every operation only adds constraints, so an assignment of permutations to the remaining
blocks that satisfies the labels at the end satisfies each tie that was ever made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class MisalignedError(ValueError):
    """Two axes whose channels overlap without lining up: no block of either moves as a whole."""


class Block:
    """``size`` interchangeable channels, or, once cut or merged, the ``parts`` that replace them.

    ``fixed``: never moves (classes, image channels). ``rigid``: must not be scaled (a unit that is
    not positively homogeneous sees it).
    """

    __slots__ = ("fixed", "parts", "rigid", "size")

    def __init__(self, size: int, *, fixed: bool = False, rigid: bool = False) -> None:
        self.size = size
        self.fixed = fixed
        self.rigid = rigid
        self.parts: Label | None = None

    def become(self, parts: Label) -> None:
        """Replace this block by ``parts``, which inherit what is forbidden to it."""
        for part, _ in parts:
            part.fixed |= self.fixed
            part.rigid |= self.rigid
        self.parts = parts

    def cut(self, at: int) -> None:
        """Split into the channels before and from ``at``."""
        self.become(((Block(at), 1), (Block(self.size - at), 1)))


Label = tuple[tuple[Block, int], ...]


def fresh(size: int, *, fixed: bool = False, rigid: bool = False) -> Label:
    """The label of an axis of ``size`` channels that nothing ties yet."""
    return ((Block(size, fixed=fixed, rigid=rigid), 1),)


def resolve(label: Label) -> Label:
    """The label in terms of blocks that have not been replaced."""
    if all(block.parts is None for block, _ in label):
        return label
    found: list[tuple[Block, int]] = []
    for block, repeat in label:
        if block.parts is None:
            found.append((block, repeat))
        else:
            block.parts = resolve(block.parts)
            found.extend((part, inner * repeat) for part, inner in block.parts)
    return tuple(found)


def tie(left: Label, right: Label) -> None:
    """Require that the channels of two axes of the same length move together.

    Raises:
        MisalignedError: if blocks of different width overlap without lining up.
    """
    first, second = deque(left), deque(right)
    while first and second:
        if _expand(first) or _expand(second):
            continue
        (x, p), (y, q) = first.popleft(), second.popleft()
        if x is y and p == q:
            continue
        if p > q:
            (x, p), (y, q), first, second = (y, q), (x, p), second, first
        width = q // p
        size = min(y.size, x.size // width)
        if q % p or size == 0:
            _freeze((x, p), (y, q), first, second)
        elif x.size != size * width or y.size != size:
            if x.size != size * width:
                x.cut(size * width)
            if y.parts is None and y.size != size:
                y.cut(size)
            first.appendleft((x, p))
            second.appendleft((y, q))
        else:
            x.become(((y, width),))
    if first or second:
        raise MisalignedError("the axes differ in length")


def _expand(queue: deque[tuple[Block, int]]) -> bool:
    """Replace the head of the queue by its parts, if it has been replaced."""
    block, repeat = queue[0]
    if block.parts is None:
        return False
    queue.popleft()
    queue.extendleft(reversed(resolve(((block, repeat),))))
    return True


def _freeze(
    a: tuple[Block, int],
    b: tuple[Block, int],
    first: deque[tuple[Block, int]],
    second: deque[tuple[Block, int]],
) -> None:
    """Overlapping blocks that do not line up: harmless if one is fixed, because then both are."""
    if not (a[0].fixed or b[0].fixed):
        raise MisalignedError(
            f"{a[0].size} channels that are {a[1]} wide meet {b[0].size} that are {b[1]} wide"
        )
    a[0].fixed = b[0].fixed = True
    rest = a[0].size * a[1] - b[0].size * b[1]
    if rest:
        (first if rest > 0 else second).appendleft((Block(abs(rest), fixed=True), 1))


def moves(label: Label | None) -> bool:
    """Whether some channel may move."""
    return any(not block.fixed for block, _ in resolve(label or ()))


def fix(label: Label | None) -> None:
    """Forbid the channels to move."""
    for block, _ in resolve(label or ()):
        block.fixed = True


def stiffen(label: Label | None) -> None:
    """Forbid the channels to be scaled."""
    for block, _ in resolve(label or ()):
        block.rigid = True


def take(label: Label, start: int, stop: int) -> Label:
    """The label of the indices ``start`` to ``stop - 1``; a block that is cut becomes two."""
    kept: list[tuple[Block, int]] = []
    for edge in (start, stop):
        offset = 0
        for block, repeat in resolve(label):
            inside = edge - offset
            if 0 < inside < block.size * repeat:
                if inside % repeat and not block.fixed:
                    raise MisalignedError(f"a cut through channels that are {repeat} wide")
                elif not block.fixed:
                    block.cut(inside // repeat)
                    break  # the other places of the same block are cut too
            offset += block.size * repeat
    offset = 0
    for block, repeat in resolve(label):
        end = offset + block.size * repeat
        low, high = max(start, offset), min(stop, end)
        if (low, high) == (offset, end):
            kept.append((block, repeat))
        elif low < high:
            kept.append((Block(high - low, fixed=True), 1))
        offset = end
    return tuple(kept)


def tile(label: Label, before: int, after: int) -> Label:
    """The label of the flattened axes (``before``, channels, ``after``)."""
    return tuple((block, repeat * after) for block, repeat in label) * before


def total(label: Iterable[tuple[Block, int]]) -> int:
    """Length of an axis with this label."""
    return sum(block.size * repeat for block, repeat in label)
