"""Tables on a terminal: what stands where, and that no word is broken."""

from __future__ import annotations

import pytest

from convscale.cli.tables import Column, number_column, print_table, table_lines

COLUMNS = [Column(""), number_column("top-1"), Column("network")]
ROWS = [["*", "83.09 %", "tresnet_m.miil_in21k_ft_in1k @224"], ["", "8.1 %", "b @96"]]


def test_numbers_stand_at_the_right_and_lines_end_without_blanks() -> None:
    assert table_lines(COLUMNS, ROWS, 60) == [
        "     top-1  network",
        "*  83.09 %  tresnet_m.miil_in21k_ft_in1k @224",
        "     8.1 %  b @96",
    ]


@pytest.mark.parametrize("width", [44, 40, 10])
def test_cells_wrap_between_words_and_a_table_grows_before_a_word_breaks(width: int) -> None:
    assert table_lines(COLUMNS, ROWS, width) == [
        "     top-1  network",
        "*  83.09 %  tresnet_m.miil_in21k_ft_in1k",
        "            @224",
        "     8.1 %  b @96",
    ]


def test_cells_are_plain_text_even_where_colours_are_forced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    print_table([Column("name")], [["[red]x[/red] :smile:"]], indent=2)
    assert capsys.readouterr().out == "  name\n  [red]x[/red] :smile:\n"
