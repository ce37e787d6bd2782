"""Intervals against scipy, tables that can be read back, and a chart that shows what it is given."""

import json
import math

import pytest
import torch

from profusion.metrics import MetricError, Score, Scores
from profusion.metrics.chart import chart
from profusion.metrics.scores import mean_interval, student_quantile
from profusion.pictures import ACCENT, from_image


def scores():
    samples = torch.tensor([0.1, 0.3, 0.2, 0.6])
    return Scores(
        (
            Score.of("CLIP-T", "ours", samples, backbone="CLIP"),
            Score.of("CLIP-T", "theirs", samples / 2, backbone="CLIP"),
            Score("Fisher", "ours", 0.0, better="lower"),
            Score("Fisher", "theirs", 1234.5, better="lower"),
            Score("rows", "theirs", 2.0, better=""),
        ),
        ("Pictures | of one seed.",),
    )


def test_the_interval_is_students():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: intervals are not checked against it")
    for freedom in (1, 2, 3, 4, 5, 6, 10, 29, 100, 10_000):
        assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-3)
    samples = torch.tensor([0.1, 0.3, 0.2, 0.6], dtype=torch.float64)
    low, high = stats.t.interval(0.95, 3, loc=samples.mean(), scale=stats.sem(samples))
    assert mean_interval(samples) == pytest.approx((0.3, low, high), rel=1e-3)


def test_an_interval_ends_where_samples_do():
    assert mean_interval(torch.tensor([0.0, 1.0]), 0.0, 1.0) == (0.5, 0.0, 1.0)


def test_one_sample_has_no_interval_and_none_is_refused():
    mean, low, high = mean_interval(torch.tensor([0.5]))
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)
    for samples, message in ((torch.zeros(0), "at least one"), (torch.tensor([1.0, math.nan]), "sample 2 of 2")):
        with pytest.raises(MetricError, match=message):
            mean_interval(samples)


def test_the_table_has_a_line_for_each_subject_and_a_column_for_each_metric():
    lines = scores().markdown().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert cells[0] == ["", "CLIP-T (CLIP) ↑", "Fisher ↓", "rows"] and set(cells[1]) == {"---"}
    assert cells[2] == ["ours", "0.300 (-0.044 to 0.644)", "0", ""]
    assert cells[3] == ["theirs", "0.150 (-0.022 to 0.322)", "1,234", "2"]
    assert lines[4:] == ["", "- Pictures | of one seed."]
    assert "ours: Fisher 0\n" in scores().text()


def test_the_rows_are_json():
    rows = json.loads(json.dumps(scores().as_json(), allow_nan=False))
    assert rows["scores"][0]["backbone"] == "CLIP" and rows["scores"][0]["count"] == 4
    assert rows["scores"][2]["low"] is None and rows["notes"] == ["Pictures | of one seed."]


def test_the_chart_has_a_dot_for_every_score():
    found = scores()
    image = chart(found, 640)
    marked = (from_image(image) * 255).round() == torch.tensor(ACCENT)
    rows = marked.all(dim=2).any(dim=1)
    dots = int((rows[1:] & ~rows[:-1]).sum())
    assert image.size[0] == 640 and dots == len(found.scores)
    assert image.tobytes() == chart(found, 640).tobytes()


def test_larger_numbers_are_further_right_and_nothing_leaves_the_picture():
    many = Scores(tuple(Score("W", f"a method with a very long name {i}", 10.0**i, better="lower") for i in range(3)))
    marked = ((from_image(chart(many)) * 255).round() == torch.tensor(ACCENT)).all(dim=2)
    columns = [marked[rows].any(dim=0).nonzero().flatten() for rows in marked.any(dim=1).nonzero().flatten().split(11)]
    places = [found.float().mean().item() for found in columns]
    assert places == sorted(places) and max(places) < 640 - 150
    assert chart(Scores((Score("W", "flat", 0.0), Score("W", "flat too", 0.0)))).size[0] == 640
    assert chart(Scores()).size[0] == 640
