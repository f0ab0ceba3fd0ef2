"""Data sets of the hub: which revision and subset are fetched, and what a partial copy says when the hub cannot be reached."""

from __future__ import annotations

import huggingface_hub
import pytest
from pictures import folder_of, parquet_of, png

from mmgen import data

pytestmark = pytest.mark.usefixtures("own_cache")
README = "---\nconfigs:\n- config_name: small\n  data_files: a/*\n- config_name: large\n  data_files: b/*\n---\n"


def test_revision_and_subset_are_asked_for(tmp_path, monkeypatch):
    folder = tmp_path / "snapshot"
    for label, name in enumerate(("a", "b")):
        parquet_of(folder / name / "train-00000-of-00001.parquet", label=[label] * 6)
    (folder / "README.md").write_text(README)

    class Info:
        sha = "1" * 40
        siblings = [type("File", (), {"rfilename": str(p.relative_to(folder))}) for p in sorted(folder.rglob("*.*"))]

    asked = []

    def snapshot(repo, **options):
        asked.append((options.get("revision"), options.get("allow_patterns")))
        if options.get("local_files_only"):
            raise FileNotFoundError
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, repo, revision: asked.append(revision) or Info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(folder / "README.md"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    found = data.load("someone/shapes", subset="large", revision="v2")
    assert found.labels.tolist() == [1] * 6
    assert asked == [("v2", None), "v2", (Info.sha, ["b/train-00000-of-00001.parquet"])]


def test_a_copy_that_may_be_partial_says_so(tmp_path, monkeypatch):
    """The names of images do not tell whether all are there; offline they are taken, with a note."""
    snapshot = folder_of(tmp_path / "snapshot", {"x/0.png": png(0), "y/1.png": png(1)})

    def offline(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    found = data.load("someone/shapes")
    assert found.labels.tolist() == [0, 1]
    assert "not known whether all of its files are there: may not ask the hub (HF_HUB_OFFLINE is set)" in found.description
