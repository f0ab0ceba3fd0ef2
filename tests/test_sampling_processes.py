"""Processes that write samples together: when one of them goes on, all that was asked for is there."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from sampled import model, record  # noqa: F401

from mmgen.sampling import file as sample_file
from mmgen.sampling import folder as sample_folder
from mmgen.sampling.drawing import SampleSettings
from mmgen.sampling.record import Origin
from mmgen.system.processes import ProcessGroup

WRITERS = {
    "out": (sample_folder.write_png, "out/samples.json"),
    "out.npz": (sample_file.write_npz, "out.npz.json"),
    "out.png": (sample_file.write_grid, "out.png.json"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_no_process_goes_on_before_the_main_one_has_finished(name, model, tmp_path, monkeypatch):
    write, kept = WRITERS[name]
    for module in (sample_folder, sample_file):
        texts = module.all_texts
        monkeypatch.setattr(module, "all_texts", lambda *given, texts=texts: time.sleep(0.3) or texts(*given))  # a slow main process
    barrier, origin = Barrier(2), Origin.of(str(model))

    def process(index: int) -> bool:
        group = ProcessGroup(index, 2, lambda: barrier.wait(60) and None)
        write(origin.load("cpu"), tmp_path / name, 4, SampleSettings(steps=1), origin, process_group=group)
        return record(tmp_path / kept)["complete"]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(process, range(2))) == [True, True]
