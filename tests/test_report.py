import base64
import csv

import cv2
import numpy as np

from svdp_jax.data import report

ROWS = [
    {"name": "a.mp4#0", "dropped": "", "start": 0.0, "face": 120, "note": "", "thumbnail": report.thumbnail([np.full((40, 60, 3), 200, np.uint8)] * 2)},
    {"name": "<b>.mp4", "dropped": "cannot be read", "note": 'said "no" & left', "thumbnail": ""},
    {"name": "c.mp4#0", "dropped": "blurred", "start": 1.23456, "face": 90, "note": "", "thumbnail": ""},
    {"name": "d.mp4#0", "dropped": "blurred", "start": 2.0, "face": 91, "note": "", "thumbnail": ""},
]


def test_a_thumbnail_is_a_strip_of_pictures():
    data = np.frombuffer(base64.b64decode(ROWS[0]["thumbnail"]), np.uint8)
    assert cv2.imdecode(data, cv2.IMREAD_COLOR).shape == (report.THUMBNAIL, 2 * 144, 3)
    assert report.thumbnail([]) == ""


def test_verdicts_are_counted():
    assert list(report.summary(ROWS).items()) == [("kept", 1), ("blurred", 2), ("cannot be read", 1)]
    assert report.summary([]) == {"kept": 0}


def test_the_report_holds_every_row(tmp_path):
    written = report.write(tmp_path, iter(ROWS), title="clips & more")
    assert [row["thumbnail"] for row in written] == ["report/000000.jpg", "", "", ""]
    with (tmp_path / "report.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["name"] for row in read] == [row["name"] for row in ROWS] and read[1]["note"] == ROWS[1]["note"] and read[1]["face"] == ""
    assert list(read[0]) == ["name", "dropped", "start", "face", "note"]
    page = (tmp_path / "report.html").read_text()
    assert "clips &amp; more" in page and "&lt;b&gt;.mp4" in page and "<b>.mp4" not in page and "start 1.23, face 90" in page
    assert page.count("class='clip ") == 4 and page.count("data-verdict='blurred'") == 2 and "blurred 2" in page
    assert page.count("<img") == 1 and [path.name for path in (tmp_path / "report").iterdir()] == ["000000.jpg"]
    report.write(tmp_path, ROWS[:1], title="again")
    assert "c.mp4" not in (tmp_path / "report.html").read_text() and sorted(path.name for path in tmp_path.iterdir()) == ["report", "report.csv", "report.html"]
