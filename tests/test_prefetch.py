"""A thread that reads ahead: the same batches in the same order, while the device works."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from test_training import assert_same, tiny, weights
from toy_task import Quiet

from mmgen.methods import IMM
from mmgen.methods.choosing import choose
from mmgen.methods.run import train
from mmgen.training import loop
from mmgen.training.prefetch import Prefetch
from mmgen.training.start import make_accelerator


def test_the_next_batch_is_read_while_this_one_is_in_use():
    """A slow source: when a batch has been worked on, the next one is there."""
    begun = {start: threading.Event() for start in (0, 8, 16, 24, 32)}

    def slow(start):
        begun[start].set()
        time.sleep(0.01)
        return start

    source = Prefetch(slow, threaded=True)
    for first in (0, 16):
        for batch in source.walk([first, first + 8], then=first + 16):
            assert batch in begun and begun[batch + 8].wait(5), "nothing reads ahead"
    source.close()


def test_without_a_thread_nothing_is_read_ahead():
    read = []
    source = Prefetch(lambda start: read.append(start) or start, threaded=False)
    walk = source.walk([0, 8], then=16)
    assert next(walk) == 0 and read == [0] and list(walk) == [8] and read == [0, 8]
    source.close()


def test_a_walk_that_begins_again_has_the_same_batches():
    """As that of the instant method, which goes over a step's batches twice; and a source that fails says so when it is asked."""
    def fetch(start):
        if start == 99:
            raise OSError("gone")
        return start

    source = Prefetch(fetch, threaded=True)
    assert [*source.walk([0, 8], then=16), *source.walk([0, 8], then=16), *source.walk([16, 24], then=99)] == [0, 8, 0, 8, 16, 24]
    with pytest.raises(OSError, match="gone"):
        list(source.walk([99], then=0))
    source.close()


@pytest.mark.slow
def test_a_training_is_the_same_with_the_thread(tmp_path, monkeypatch):
    settings = {"train.max_images": 64, "run.eval_num": 0, "run.checkpoint_every": 32}
    train(IMM, tiny(**settings), tmp_path / "plain", Quiet(), device="cpu")
    monkeypatch.setattr(loop, "Prefetch", lambda fetch, threaded: Prefetch(fetch, True))
    for images in (32, 64):  # resumed
        AcceleratorState._reset_state(reset_partial_state=True)
        train(IMM, tiny(**{**settings, "train.max_images": images, "optimizer.decay": "none"}), tmp_path / "parts", Quiet(), device="cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert_same(weights(tmp_path / "plain"), weights(tmp_path / "parts"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_on_a_gpu_the_size_of_a_pass_is_found_by_itself(monkeypatch):
    """Unless a number is asked for; on a CPU it is the preset's."""
    size = lambda *changes, **more: choose(IMM, *changes, **more).config.run.batch_per_device  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert size(device="auto") == size(device="cuda") == "auto" and size(device="cpu") == 128
    assert size({"run.batch_per_device": 64}, device="cuda") == 64
    assert choose(IMM, device="cuda").folder == choose(IMM, device="cpu").folder
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert size(device="auto") == 128


def test_gradients_are_views_of_their_buckets_and_buffers_stay(tmp_path):
    accelerator = make_accelerator(tiny().train, tiny().run, tmp_path, "cpu")
    handler = accelerator.ddp_handler
    assert handler.gradient_as_bucket_view and not handler.broadcast_buffers
