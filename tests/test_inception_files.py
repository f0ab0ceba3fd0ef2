"""Where Inception's file is looked for, and how it is downloaded."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import hashlib
import io
import threading
import urllib.request
from pathlib import Path

import pytest
from inception_tools import full, nothing_found  # noqa: F401

from mmgen.errors import MmgenError, ModelError
from mmgen.metrics import inception
from mmgen.metrics.features import build_extractor
from mmgen.metrics.inception import SCRIPT, WEIGHTS
from mmgen.metrics.published_file import Published, locate


# Where the weights are looked for. The file's content does not matter there.
PUBLISHED = Published("net.pt", "https://example.org/net.pt", hashlib.sha256(b"good").hexdigest(), "--net", "MMGEN_NET")


@pytest.fixture
def places(tmp_path, monkeypatch) -> dict[str, Path]:
    monkeypatch.delenv("MMGEN_NET", raising=False)
    names = {"option": "a.pt", "variable": "b.pt", "cache": "cache/net.pt", "elsewhere": "elsewhere/net.pt"}
    result = {key: tmp_path / name for key, name in names.items()}
    for path in result.values():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"good")
    return result


def test_search_order(places, monkeypatch, tmp_path):
    elsewhere = [tmp_path / "nowhere", tmp_path / "elsewhere"]
    monkeypatch.setenv("MMGEN_NET", str(places["variable"]))
    assert locate(PUBLISHED, places["option"], elsewhere=elsewhere).path == places["option"]
    assert locate(PUBLISHED, elsewhere=elsewhere).path == places["variable"]
    monkeypatch.setenv("MMGEN_NET", str(tmp_path / "elsewhere"))  # a folder that holds it
    assert locate(PUBLISHED).path == places["elsewhere"]
    monkeypatch.delenv("MMGEN_NET")
    assert locate(PUBLISHED, elsewhere=elsewhere).path == places["cache"]
    places["cache"].unlink()
    assert locate(PUBLISHED, elsewhere=elsewhere).path == places["elsewhere"]
    assert locate(PUBLISHED, elsewhere=elsewhere).published


def test_a_variable_that_names_the_other_modes_file(places, monkeypatch, tmp_path):
    (tmp_path / "cache" / "other.pt").write_bytes(b"x")
    monkeypatch.setenv("MMGEN_NET", str(tmp_path / "cache" / "other.pt"))
    assert locate(PUBLISHED, others=["other.pt"]).path == places["cache"]
    assert not locate(PUBLISHED).published  # without that knowledge it is the user's own


def test_named_files_may_be_others_and_found_ones_may_not(places, monkeypatch, tmp_path):
    for path in places.values():
        path.write_bytes(b"bad")
    assert not locate(PUBLISHED, places["option"]).published
    with pytest.raises(ModelError, match=r"cache.net\.pt is damaged or another file.*delete it.*--net FILE"):
        locate(PUBLISHED)
    places["cache"].unlink()
    with pytest.raises(ModelError, match=r"elsewhere.net\.pt is damaged"):
        locate(PUBLISHED, elsewhere=[tmp_path / "elsewhere"])


def test_named_files_that_do_not_exist(monkeypatch, tmp_path):
    with pytest.raises(ModelError, match="none.pt, named by --net, does not exist"):
        locate(PUBLISHED, tmp_path / "none.pt")
    with pytest.raises(ModelError, match="named by --net, does not exist"):
        locate(PUBLISHED, tmp_path)  # a folder without it
    monkeypatch.setenv("MMGEN_NET", str(tmp_path / "none.pt"))
    with pytest.raises(ModelError, match=r"\$MMGEN_NET names .*none.pt, which does not exist"):
        locate(PUBLISHED)


def test_without_a_network(tmp_path):
    message = r"cannot download net\.pt \(Name or service not known\): fetch https://example.org/net\.pt and put it at "
    with pytest.raises(ModelError, match=message) as caught:
        locate(PUBLISHED)
    assert str(tmp_path / "cache" / "net.pt") in str(caught.value) and "--net FILE" in str(caught.value)


class Response(io.BytesIO):
    """What urlopen returns: of `total` bytes, `data` arrive."""

    def __init__(self, data: bytes, total: int | None = None) -> None:
        super().__init__(data)
        self.headers = {"Content-Length": str(len(data) if total is None else total)}


def serve(monkeypatch, *responses) -> list[str]:
    """Makes urlopen answer with these, in turn; returns the URLs asked for."""
    asked, queue = [], list(responses)

    def urlopen(request, timeout):
        asked.append(request.full_url)
        return queue.pop(0)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_download(monkeypatch, tmp_path):
    asked = serve(monkeypatch, Response(b"good"))
    progress = []
    found = locate(PUBLISHED, progress=lambda done, total: progress.append((done, total)))
    assert found.path == tmp_path / "cache" / "net.pt" and found.published and found.path.read_bytes() == b"good"
    assert progress == [(4, 4)] and asked == [PUBLISHED.url]
    assert locate(PUBLISHED) == found and len(asked) == 1  # from the cache
    assert not list((tmp_path / "cache").glob(".tmp-*"))


@pytest.mark.parametrize(
    "response, message",
    [(Response(b"evil"), "is not the published file.*thrown away"), (Response(b"go", 4), "ended after 2 of 4 bytes: try again")],
)
def test_a_download_that_goes_wrong_leaves_nothing(response, message, monkeypatch, tmp_path):
    serve(monkeypatch, response, Response(b"good"))
    with pytest.raises(ModelError, match=message):
        locate(PUBLISHED)
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []
    assert locate(PUBLISHED).published  # the next try is a new one


def test_a_connection_lost_on_the_way(monkeypatch, tmp_path):
    class Lost(Response):
        def read(self, size=-1):
            raise TimeoutError("timed out")

    serve(monkeypatch, Lost(b"good"))
    with pytest.raises(ModelError, match=r"cannot download net\.pt \(timed out\): fetch"):
        locate(PUBLISHED)
    assert not list((tmp_path / "cache").glob("*.pt"))


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "file"))
    with pytest.raises(MmgenError, match="cannot write .*MMGEN_CACHE"):
        locate(PUBLISHED)


def test_two_at_once_download_once(monkeypatch):
    started = threading.Event()

    class Slow(Response):
        def read(self, size=-1):
            started.wait(5)
            return super().read(size)

    asked = serve(monkeypatch, Slow(b"good"), Slow(b"good"))
    found = []
    threads = [threading.Thread(target=lambda: found.append(locate(PUBLISHED))) for _ in range(2)]
    for thread in threads:
        thread.start()
    started.set()
    for thread in threads:
        thread.join()
    assert len(asked) == 1 and len(found) == 2 and found[0] == found[1]


@pytest.mark.parametrize("mode, name", [("tf", SCRIPT), ("torch", WEIGHTS)])
def test_the_published_files_are_asked_for(mode, name, tmp_path):
    with pytest.raises(ModelError) as caught:
        build_extractor(mode=mode)
    assert inception.URLS[name] in str(caught.value) and str(tmp_path / "cache" / name) in str(caught.value)
    assert inception.URLS[name].endswith("/" + name)


def test_clean_fids_own_places(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert inception._elsewhere(WEIGHTS) == [tmp_path / "torch" / "hub" / "checkpoints"]
    assert len(inception._elsewhere(SCRIPT)) >= 1


@pytest.mark.slow
def test_torchvision_of_another_torch(monkeypatch, full):
    import importlib

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(MmgenError, match="torchvision::nms does not exist.*must match"):
        build_extractor(mode="clean", inception=full)
