"""CSV tables: what is read, what is refused and how, what is written."""

import pytest

from common import tables
from common.cli import UserError


def test_a_table_comes_back(tmp_path):
    rows = [{"name": "a, b", "age": 61.25, "sex": None}, {"name": 'quoted "c"', "age": 1 / 3, "site": 2}]
    tables.write_csv(tmp_path / "new" / "t.csv", rows)
    columns, found = tables.read_csv(tmp_path / "new" / "t.csv", "")
    assert columns == ["name", "age", "sex", "site"]
    assert found == [{"name": "a, b", "age": "61.25", "sex": "", "site": ""},
                     {"name": 'quoted "c"', "age": repr(1 / 3), "sex": "", "site": "2"}]  # fmt: skip


def test_columns_and_digits(tmp_path):
    tables.write_csv(tmp_path / "t.csv", [{"a": 1 / 3, "b": 123456, "c": "x"}], ("b", "a"), digits=3)
    assert (tmp_path / "t.csv").read_text() == "b,a\n123456,0.333\n"  # whole numbers keep their digits
    tables.write_csv(tmp_path / "t.csv", [], ("b", "a"))
    assert (tmp_path / "t.csv").read_text() == "b,a\n"


def test_a_byte_order_mark_and_spaces_are_taken(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfsubject, path\r\ns1, a.nii\r\n")
    assert tables.read_csv(tmp_path / "t.csv", "") == (["subject", "path"], [{"subject": "s1", "path": "a.nii"}])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no table .*t.csv; make one"),
        (b"", "has no rows"),
        (b"a,b\n", "has no rows"),
        (b"a,b\n1,2\n3\n", "row 3 has not as many cells"),
        (b"a,b\n1,2,3\n", "row 2 has not as many cells"),
        (b"a,b\n\xff,2\n", "is no CSV table in UTF-8"),
    ],
)
def test_what_is_no_table_is_refused(content, says, tmp_path):
    if content is not None:
        (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=says):
        tables.read_csv(tmp_path / "t.csv", "make one")
