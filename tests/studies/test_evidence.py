"""The chart of the README, from stored results alone."""

import numpy as np

from examples.studies import evidence


def test_the_numbers_of_a_panel_are_means_of_each_seed(tmp_path):
    """Of two searches the last counts, of a seed all lines that the panel keeps, each against one row."""
    lines = ["arm,seed,property,test"]
    arms = {
        "each property alone": 1,
        "sum": 1,
        "search, 2 runs": 9,
        "search, 4 runs": 3,
        "scale_invariant": 5,
    }
    for arm, base in arms.items():
        lines += [f'"{arm}",{seed},{p},{base + seed + p}' for seed in (0, 10) for p in (0, 1)]
    lines.append('"search, 4 runs, log of the sum",0,0,99')
    (tmp_path / "molecules").mkdir()
    file = tmp_path / "molecules" / "table.csv"
    file.write_text("\n".join(lines))
    panel = evidence.PANELS[0]
    found = evidence.values_of(panel, tmp_path)
    # In percent against the first row, whose errors are 1 and 2, and 11 and 12.
    np.testing.assert_allclose(found[0], [0, 0])
    np.testing.assert_allclose(
        found[1], [100 * (3 / 1 + 4 / 2 - 2) / 2, 100 * (13 / 11 + 14 / 12 - 2) / 2]
    )
    np.testing.assert_allclose(
        found[2], [100 * (5 / 1 + 6 / 2 - 2) / 2, 100 * (15 / 11 + 16 / 12 - 2) / 2]
    )
    file.write_text("\n".join(lines[:5]))
    assert evidence.values_of(panel, tmp_path) is None
    assert evidence.values_of(evidence.PANELS[1], tmp_path) is None


def test_the_chart_is_drawn_from_what_is_stored(tmp_path):
    out = tmp_path / "evidence.svg"
    titles = evidence.draw(evidence.RESULTS, out)
    assert "MovieLens in unlike units" in titles
    assert out.read_text(encoding="utf-8").lstrip().startswith("<?xml")
