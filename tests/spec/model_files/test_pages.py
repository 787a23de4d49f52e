"""The tables of docs/models.md are those that its script writes."""

import model_table


def test_tables_are_up_to_date():
    assert model_table.PAGE.read_text(encoding="utf-8") == model_table.page(), "run python bench/model_table.py"
