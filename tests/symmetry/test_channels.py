"""Labels tie to the coarsest motion that satisfies every constraint, and to no less."""

from __future__ import annotations

import pytest

from weightnet.symmetry.channels import (
    Label,
    MisalignedError,
    fix,
    fresh,
    resolve,
    stiffen,
    take,
    tie,
    tile,
    total,
)


def shape(label: Label) -> list[tuple[int, int]]:
    return [(block.size, repeat) for block, repeat in resolve(label)]


def test_equal_blocks_merge_and_inherit() -> None:
    a, b = fresh(4, fixed=True), fresh(4)
    stiffen(b)
    tie(a, b)
    assert resolve(a) == resolve(b)
    block = resolve(a)[0][0]
    assert block.fixed and block.rigid


def test_borders_are_cut_on_both_sides() -> None:
    a, b = fresh(4) + fresh(2), fresh(1) + fresh(5)
    tie(a, b)
    assert shape(a) == shape(b) == [(1, 1), (3, 1), (2, 1)]
    assert resolve(a) == resolve(b)


def test_a_shift_against_itself_leaves_one_small_block() -> None:
    a, b = fresh(4), fresh(2)
    tie(a + b, b + a)
    assert len(set(resolve(a + b))) == 1 and shape(a) == [(2, 1), (2, 1)]


def test_flattened_channels_move_whole() -> None:
    channels, row = fresh(3), fresh(27)
    tie(row, tile(channels, 1, 9))
    assert resolve(row) == ((resolve(channels)[0][0], 9),)
    assert total(row) == 27
    repeated = fresh(6)
    tie(repeated, tile(channels, 2, 1))
    assert resolve(repeated) == resolve(channels) * 2


def test_blocks_that_do_not_line_up() -> None:
    with pytest.raises(MisalignedError, match="3 channels that are 2 wide"):
        tie(tile(fresh(3), 1, 2), tile(fresh(2), 1, 3))
    free, fixed = fresh(3), fresh(2)
    fix(fixed)
    tie(tile(free, 1, 2), tile(fixed, 1, 3))
    assert all(block.fixed for block, _ in resolve(free))
    with pytest.raises(MisalignedError):
        tie(fresh(3), fresh(4))


def test_a_part_is_a_block_of_its_own_everywhere() -> None:
    label = fresh(5)
    part = take(label, 1, 3)
    assert shape(part) == [(2, 1)]
    assert shape(label) == [(1, 1), (2, 1), (2, 1)]
    assert resolve(label)[1] == part[0]
    assert take(label, 2, 2) == ()
    wide = tile(fresh(4), 1, 3)
    with pytest.raises(MisalignedError, match="3 wide"):
        take(wide, 4, 9)
    fix(wide)
    assert total(take(wide, 4, 9)) == 5
