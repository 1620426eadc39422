import csv
import json

import pytest

from scalevit.bench import loaders as bench
from scalevit.errors import UserError


def test_it_measures_and_writes_its_files(tmp_path, monkeypatch, capsys):
    """Two contestants and the smallest numbers: what counts here is that it runs."""
    chosen = ("ours, fast path", "timm wds", "timm wds, prefetcher")
    monkeypatch.setattr(bench, "_CONTESTANTS", {name: bench._CONTESTANTS[name] for name in chosen})
    bench.compare_loaders(64, 3, 1, tmp_path / "new" / "data")
    with open(tmp_path / "new" / "data.csv") as file:
        rows = {row["contestant"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(chosen)
    assert float(rows["timm wds"]["over_timm_wds"]) == 1
    assert all(float(row["images_per_cpu_second"]) > 0 for row in rows.values())
    about = json.loads((tmp_path / "new" / "data.json").read_text())
    assert 80_000 < about["mean_jpeg_bytes"] < 130_000
    assert {"packages", "cpus", "date"} <= about.keys()
    resume = about["seconds_to_resume_at_position_1e6"]
    assert resume["ours"] < resume["skipping"]
    assert (tmp_path / "new" / "data.png").read_bytes()[:4] == b"\x89PNG"
    assert "images/s/core" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_reported_before_measuring(tmp_path, monkeypatch):
    monkeypatch.delattr(bench, "make_images")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written"):
        bench.compare_loaders(64, 3, 1, tmp_path / "file" / "data")
