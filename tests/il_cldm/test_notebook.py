"""The notebook runs from a fresh clone, headless, and shows what it says."""

import re

import numpy as np
import pytest

from tests import notebooks
from tests.helpers import ROOT

NOTEBOOK = ROOT / "il_cldm" / "notebooks" / "visualize.ipynb"


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    monkeypatch.delenv("IL_CLDM_ROOT", raising=False)
    shown = notebooks.execute(NOTEBOOK, tmp_path, monkeypatch)
    assert len(shown.pictures) >= 9
    suvr = {int(c): np.array(v.split(","), float) for c, v in re.findall(r"class (\d) \[([^]]*)\]", shown.text)}
    assert set(suvr) == {0, 3}
    np.testing.assert_allclose(suvr[0][0], suvr[3][0], atol=1e-3)  # scale 0: the label has no say
    gap = suvr[3] - suvr[0]
    assert gap[1] > 0.01 and gap[2] > gap[1]  # the sick class takes up more, and more so the more it is guided
