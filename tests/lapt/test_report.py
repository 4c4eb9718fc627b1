"""The page of an evaluation says what its report says."""

from html.parser import HTMLParser

import pytest

from lapt import dataset, report
from lapt.inference import NOTICE
from tests.lapt.test_evaluate import measure, shifted, write_samples

PIXEL = bytes.fromhex(  # a PNG of one grey pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63680000008200815f9ff2680000"
    "000049454e44ae426082"
)


class Reader(HTMLParser):
    """Tables as lists of rows, headings, and whether every tag that was opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.open, self.titles, self.images = [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.images += tag == "img"
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "h2":
            self.titles.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] in (["td"], ["th"]):
            self.tables[-1][-1][-1] += data
        if self.open[-1:] == ["h2"]:
            self.titles[-1] += data


@pytest.fixture(scope="module")
def found(prepared, tmp_path_factory):
    """The report of samples with half the lesion error of a baseline."""
    folder, cases = tmp_path_factory.mktemp("page"), dataset.read_cases(prepared, "train")
    for name, by in (("base", 60), ("ours", 30)):
        write_samples(folder / name, cases, shifted(by, lambda mask, lesion: lesion))
    words = ("--split", "train", "--baseline", folder / "base", "--features", "random", "--fid_resamples", 3)
    return measure(prepared, folder / "ours", *words)[0]


def test_every_table_holds_the_numbers_of_the_report(found):
    page = Reader(report.page(found, []))
    assert not page.open and page.images == 0
    assert page.titles == ["Images", "Segmentation", "Synthetic minus baseline: images",
                           "Synthetic minus baseline: segmentation", "Lesions by size", "Realism of slices",
                           "Definitions", "Figures"]  # fmt: skip
    head, *rows = page.tables[0]
    at = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    for method in ("synthetic", "baseline"):
        known = found["images"][method]["adc"]["lesion_mae"]
        low, high = known["ci95"]
        assert at["lesion_mae"][f"{method}, adc"] == f"{known['mean']:.4g} [{low:.4g}, {high:.4g}]"
    known = found["synthetic_minus_baseline"]["images"]["adc"]["lesion_mae"]
    rows = next(t for t in page.tables if t[0][0] == "adc")
    (row,) = [row for row in rows if row[0] == "lesion_mae"]
    assert row[1].startswith(f"{known['mean_difference']:.4g} [") and row[3:] == ["1", str(known["n_patients"])]
    lesions = next(t for t in page.tables if t[0][:2] == ["synthetic", "lesions"])
    assert [row[0] for row in lesions[1:]] == [line["size"] for line in found["lesion_sizes"]["synthetic"]]
    realism = next(t for t in page.tables if t[0][0] == "slices against real")
    assert realism[1][1] == f"{found['realism'][realism[1][0]]['fid']:.4g}"
    assert len(page.tables[-1]) == 1 + len(found["definitions"])


def test_names_are_escaped_and_figures_lie_inside(found, tmp_path):
    (tmp_path / "a<b.png").write_bytes(PIXEL)
    text = report.page(found | {"note": "<script>no</script>", "split": "a&b"}, [tmp_path / "a<b.png"])
    page = Reader(text)
    assert page.images == 1 and not page.open and "script" not in page.open
    assert "&lt;script&gt;" in text and "a&amp;b" in text and 'alt="a&lt;b"' in text and "<script" not in text
    assert NOTICE.capitalize() in text and "://" not in text


def test_what_was_not_measured_is_left_out_or_a_dash():
    assert report.number(None) == "–" and report.with_interval(None, "mean") == "–"
    assert report.with_interval({"mean": 2.0, "ci95": [None, None]}, "mean") == "2"
    rows = {"a": {"x": None, "y": {"mean": 1.5, "ci95": [1, 2]}}, "b": {"x": None, "y": None}}
    assert Reader(report.measures(rows)).tables == [[["", "a", "b"], ["y", "1.5 [1, 2]", "–"]]]
