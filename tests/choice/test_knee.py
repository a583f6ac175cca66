"""The front's knee, by hand."""

from convscale.choice.knee import _some, knee_of


def test_the_knee_is_farthest_above_the_line_between_the_ends():
    # log2 of the speed falls 3, 2, 1, 0; accuracy rises 60, 75, 78, 80. Above the line, as shares of both extents:
    # 0; 15/20 - 1/3 = 0.417; 18/20 - 2/3 = 0.233; 0
    assert knee_of([(800, 60), (400, 75), (200, 78), (100, 80)]) == 1
    # speeds count by their logarithms: 8/20 - 1/3 = 0.07 and 16/20 - 2/3 = 0.13; on a straight scale both lie below it
    assert knee_of([(800, 60), (400, 68), (200, 76), (100, 80)]) == 2
    # accuracy that comes late: 2/20 - 1/3 < 0, 5/20 - 2/3 < 0, so the accurate end
    assert knee_of([(800, 60), (400, 62), (200, 65), (100, 80)]) == 3


def test_short_fronts_end_at_the_accurate_end():
    assert knee_of([(800, 60)]) == 0
    assert knee_of([(800, 60), (400, 61)]) == 1


def test_five_rows_hold_both_ends_and_the_knee():
    assert _some(4, 2) == [0, 1, 2, 3]
    for must in range(12):
        rows = _some(12, must)
        assert len(rows) == 5
        assert {0, must, 11} <= set(rows)
