"""The arithmetic of csrc/cuda/*_layout.h against brute force: tiles, ring, fragments, descriptors and merging."""

import itertools
import math

import numpy as np
import pytest

INF, NAN = math.inf, math.nan


@pytest.fixture
def layout(internals):
    return internals.hopper_layout


@pytest.fixture(params=["Cooperative", "Pingpong"])
def shape(request, layout):
    return getattr(layout, request.param)


@pytest.mark.parametrize("columns", [1, 2, 5, 33])
@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 9, 16, 29])
def test_every_tile_has_its_turn_once(layout, blocks, columns):
    places = [layout.tile_place(number, blocks, columns) for number in range(blocks * columns)]
    assert sorted(places) == list(itertools.product(range(blocks), range(columns)))


def test_the_ring_s_parity_is_that_of_a_stage_s_uses(shape):
    walking, jumped = np.moveaxis(shape.ring(100).reshape(100, 2, 2), 1, 0)
    steps = np.arange(100)
    np.testing.assert_array_equal(walking[:, 0], steps % shape.STAGES)
    np.testing.assert_array_equal(walking[:, 1], steps // shape.STAGES % 2)
    np.testing.assert_array_equal(jumped, walking)


def test_every_score_of_a_tile_is_held_once(shape, layout):
    places = shape.fragments().reshape(shape.TEAM_WARPS, 32, shape.HEIGHT, shape.BM // 8, 2, 2, 5)
    register, row, column, row_of, column_of = np.moveaxis(places, -1, 0)
    held = np.sort(register.reshape(shape.TEAM_WARPS * 32, -1))
    np.testing.assert_array_equal(held, np.broadcast_to(np.arange(layout.kScores), held.shape))
    np.testing.assert_array_equal(row_of, row)
    np.testing.assert_array_equal(column_of, column)
    holders = np.zeros((shape.BN, shape.BM), int)
    np.add.at(holders, (row, column), 1)
    assert (holders == 1).all()
    # PTX ISA: a warpgroup's wgmma sums 64 rows from a multiple of 64 on, of which 16 go to each warp.
    warp, m = np.ix_(range(shape.TEAM_WARPS), range(shape.HEIGHT))
    first = 64 * (warp // 4 if shape.HEIGHT == 1 else m)
    expected = (first // 16 + warp % 4)[:, None, :, None, None, None]
    np.testing.assert_array_equal(row // 16, np.broadcast_to(expected, row.shape))


def copied_to(stage, row, byte):
    """Where a copy with 128-byte swizzle puts a byte of a row: its 16-byte pieces change places by the row modulo 8.

    CUDA driver API, CU_TENSOR_MAP_SWIZZLE_128B.
    """
    return stage + row * 128 + ((byte // 16) ^ (row % 8)) * 16 + byte % 16


def read_from(descriptor, row, channel):
    """Where wgmma reads an operand (PTX ISA, matrix descriptor): a plain address, then the swizzle."""
    start, distance = (descriptor & 0x3FFF) * 16, (descriptor >> 32 & 0x3FFF) * 16
    plain = start + row // 8 * distance + row % 8 * 128 + channel * 2
    return plain ^ (plain >> 7 & 7) << 4


@pytest.mark.parametrize("first_row", [0, 64])
@pytest.mark.parametrize("stage", [0, 1024, 16384, 196608])
def test_operands_are_read_where_they_were_copied_to(layout, stage, first_row):
    descriptor = layout.operand(stage + first_row * 128)
    assert descriptor >> 62 == 1
    assert descriptor & ~(0x3FFF | 0x3FFF << 32 | 3 << 62) == 0
    step, row, channel = np.ix_(range(layout.kDepth // layout.kInstruction), range(64), range(layout.kInstruction))
    descriptors = np.array([descriptor + k * layout.kOperandStep for k in range(len(step))])[:, None, None]
    read = read_from(descriptors.astype(np.int64), row, channel)
    copied = copied_to(stage, first_row + row, (step * layout.kInstruction + channel) * 2)
    np.testing.assert_array_equal(read, copied)


def test_partial_maxima_merge_to_the_first_of_the_largest(layout):
    """A NaN above all, nothing where all is -inf; folding two sections apart, then both, is the same."""
    random = np.random.default_rng(1)
    values = np.array([-INF, -1, 0, 1, INF, NAN], np.float32)
    width, lines, start = 4, 3, 100
    for trial in range(20_000):
        parts, kinds = int(random.integers(1, 12)), 6 if trial % 2 else 3
        line, cut = int(random.integers(lines)), int(random.integers(parts + 1))
        score = values[random.integers(0, kinds, (parts, lines))]
        place = random.integers(0, width, (parts, lines)).astype(np.int16)
        column = score[:, line]
        nan = np.isnan(column)
        part = int(nan.argmax() if nan.any() else column.argmax())
        truth = (float(column[part]), start + part * width + int(place[part, line]))
        if column[part] == -INF:
            truth = -INF, -1

        section = {"line": line, "width": width, "start": start}
        best = layout.fold((-INF, -1), score, place, begin=0, end=cut, **section)
        later = layout.fold((-INF, -1), score, place, begin=cut, end=parts, **section)
        if layout.beats(later[0], best[0]):
            best = later
        assert best[1] == truth[1]
        assert best[0] == truth[0] or (math.isnan(best[0]) and math.isnan(truth[0]))


def test_partial_log_sums_merge_in_any_grouping(layout):
    """Of two neighbours at a time; what fp32 rounds is left open by a part in 10⁵."""
    random = np.random.default_rng(1)
    values = np.array([-INF, -1e30, -90, -1, 0, 2.5, 300, INF, NAN], np.float32).astype(float)
    for trial in range(20_000):
        numbers = values[random.integers(0, 7 if trial % 3 else 9, int(random.integers(9)))].tolist()
        tops = [INF if math.isnan(t) else t for t in numbers]  # as the epilogue has it of one number
        parts = [
            (top, 0.0 if top == -INF else 1.0 if math.isfinite(top) else math.exp(t))
            for t, top in zip(numbers, tops, strict=True)
        ]
        while len(parts) > 1:
            k = int(random.integers(len(parts) - 1))
            parts[k : k + 2] = [layout.join_logs(*parts[k : k + 2])]
        top, total = parts[0] if parts else (-INF, 0.0)
        assert top == max(tops, default=-INF)
        if any(map(math.isnan, numbers)):
            assert math.isnan(total)
        elif top == INF:
            assert total == INF
        else:
            truth = sum(math.exp(t - top) for t in numbers if t != -INF)
            assert abs(total - truth) <= 1e-5 * truth


def test_ranges_that_overlap_share_a_number(layout):
    ranges = [(low, high) for low in range(4) for high in range(low, 4)]
    for x, y in itertools.product(ranges, ranges):
        shared = set(range(x[0], x[1] + 1)) & set(range(y[0], y[1] + 1))
        assert layout.overlap(x, y) == bool(shared)
