"""The training loop: resuming, exactness, accumulation. On the embedded digits with a tiny network."""

import json
import signal
import time
from pathlib import Path

import forks
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from toy_task import Quiet

from mmgen.config import sections as configs
from mmgen.errors import ConfigError, TrainingError
from mmgen.config.imm import ImmConfig, resolve
from mmgen.training.batches import data_indices, split_batch
from mmgen.training.ema import EMA, ema_decays
from mmgen.training.optim import learning_rate
from mmgen.methods import IMM
from mmgen.methods.run import train

TINY = {
    "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1},
    "data": {"name": "digits", "conditional": True},
    "train": {"batch_size": 16, "max_images": 160, "precision": "fp32", "ema_betas": [0.9], "ema_half_lives": [64]},
    "optimizer": {"name": "radam", "lr": 1e-3, "warmup_images": 32},
    "run": {"batch_per_device": 8, "checkpoint_every": 32, "preview_every": 10**9, "eval_every": 10**9, "eval_num": 32,
            "eval_steps": [1, 2], "log_every": 2},
}  # fmt: skip


def tiny(**changes):
    return resolve(TINY, configs.nest(changes, ImmConfig))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    last = max((folder / "checkpoints").glob("[0-9]*"))
    return {f"{file.stem}.{k}": v for file in sorted(last.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same(a, b):
    assert a.keys() == b.keys() and len(a) > 50
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_a_run_leaves_what_it_promises(tmp_path):
    outcome = train(IMM, tiny(**{"run.preview_every": 64, "run.eval_every": 64}), tmp_path / "run", Quiet(), device="cpu")
    assert outcome.finished and outcome.images == 160
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.json", "log.jsonl", "checkpoints", "model.safetensors", "model-ema-64img.safetensors", "previews", "curves.png",
            "samples.png", "results.json", "model-best.safetensors", ".lock"} == names  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines if "loss" in line] == [32, 64, 96, 128, 160]
    assert [line["images"] for line in lines if "values" in line] == [64, 128, 160]
    assert len(list((tmp_path / "run/previews").iterdir())) == 2
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2  # keep_checkpoints
    assert outcome.results["values"].keys() == {"1", "2"}


def test_an_unconditional_run_has_its_pictures(tmp_path):
    config = tiny(**{"data.conditional": False, "train.max_images": 32, "run.preview_every": 16})
    assert train(IMM, config, tmp_path / "run", Quiet(), device="cpu").finished
    assert (tmp_path / "run/samples.png").is_file() and (tmp_path / "run/previews/000000000016.png").is_file()


def test_resuming_gives_the_same_weights_bit_for_bit(tmp_path):
    train(IMM, tiny(), tmp_path / "whole", Quiet(), device="cpu")
    for images in (48, 80, 160):  # 48 and 80 are not multiples of checkpoint_every
        AcceleratorState._reset_state(reset_partial_state=True)
        reporter = Quiet()
        train(IMM, tiny(**{"train.max_images": images}), tmp_path / "parts", reporter, device="cpu")
    assert any("resuming from" in note for note in reporter.notes)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_is_the_same_bit_for_bit(tmp_path):
    """SIGKILL in the middle of steps, saves and start-up; then the same command again."""
    command = "-m", "mmgen", "train-imm", "--device", "cpu", "--config", "tiny.toml", "--preset", "digits-imm"
    (tmp_path / "tiny.toml").write_text(
        "[network]\nkind='unet'\nmodel_channels=8\nchannel_mult=[1,1]\nnum_blocks=1\nattn_resolutions=[4]\ndropout=0.1\n"
        "[train]\nbatch_size=16\nmax_images=1600\n[run]\ncheckpoint_every=32\neval_num=0\nlog_every=1\neval_steps=[1]\n"
    )
    whole = forks.run(*command, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    log = tmp_path / "killed/log.jsonl"
    for moment, images in enumerate((100, 500, 1000)):
        process = forks.Process(*command, "--out", "killed", cwd=tmp_path)
        while process.poll() is None and not (log.exists() and f'"images": {images // 16 * 16},' in log.read_text()):
            time.sleep(0.01)
        time.sleep(0.013 * moment)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    last = forks.run(*command, "--out", "killed", cwd=tmp_path)
    assert last.returncode == 0, last.stderr
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    lines = [json.loads(line)["images"] for line in log.read_text().splitlines() if "loss" in json.loads(line)]
    assert lines == list(range(16, 1601, 16))  # no line twice, none lost


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signals_save_and_end_with_the_usual_status(tmp_path, number, status):
    command = "-m", "mmgen", "train-imm", "--device", "cpu", "--out", "run", "--set", "run.log_every=1", "--batch-size", "16"
    process = forks.Process(*command, cwd=tmp_path)
    log = tmp_path / "run/log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    assert "resumes" in stderr and "Traceback" not in stderr
    assert (tmp_path / "run/model.safetensors").is_file()
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    """Rounds of 4, 8 or 16 images: the same groups, times and noise, hence the same loss and nearly the same weights."""
    runs = {}
    for size in (4, 8, 16):
        AcceleratorState._reset_state(reset_partial_state=True)
        changes = {
            "run.batch_per_device": size,
            "network.dropout": 0.0,
            "optimizer.name": "adam",
            "train.max_images": 48,
        }
        train(IMM, tiny(**changes), tmp_path / str(size), Quiet(), device="cpu")
        log = [json.loads(line) for line in (tmp_path / str(size) / "log.jsonl").read_text().splitlines()]
        runs[size] = ([x["loss"] for x in log if "loss" in x], load_file(tmp_path / str(size) / "model.safetensors"))
    for size in (4, 8):
        assert runs[size][0] == pytest.approx(runs[16][0], rel=1e-5)
        for key, value in runs[16][1].items():
            torch.testing.assert_close(runs[size][1][key], value, rtol=1e-3, atol=2e-5)


def test_another_run_in_the_folder_is_refused(tmp_path):
    train(IMM, tiny(**{"train.max_images": 16}), tmp_path / "run", Quiet(), device="cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(TrainingError, match=r"loss.k = 15.0, not 12.0"):
        train(IMM, tiny(**{"loss.k": 12}), tmp_path / "run", Quiet(), device="cpu")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.txt").write_text("mine")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(TrainingError, match="holds no run"):
        train(IMM, tiny(), tmp_path / "foreign", Quiet(), device="cpu")


def test_max_time_ends_as_finished_and_can_go_on(tmp_path):
    config = tiny(**{"train.max_images": 10**6})
    outcome = train(IMM, config, tmp_path / "run", Quiet(), device="cpu", max_seconds=0.3)
    assert 0 < outcome.images < 10**6 and not outcome.finished and outcome.results["images"] == outcome.images
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(IMM, config, tmp_path / "run", Quiet(), device="cpu", max_seconds=0.3).images > outcome.images


def test_a_batch_that_devices_cannot_share_is_refused():
    assert split_batch(4096, 4, 3, 128) is None
    parts = split_batch(4096, 4, 2, 100)
    assert (parts.size, parts.rounds, parts.processes) == (64, 32, 2)
    starts = sorted(parts.start(r, p) for r in range(parts.rounds) for p in range(2))
    assert starts == list(range(0, 4096, 64))
    with pytest.raises(ConfigError, match="multiple of loss.group_size"):
        tiny(**{"train.batch_size": 18})


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own():
    rows = data_indices(10, 0, 30, seed=3).reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in rows.tolist())
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 3
    pieces = [data_indices(10, start, 5, seed=3) for start in range(0, 30, 5)]
    assert [x for piece in pieces for x in piece.tolist()] == rows.ravel().tolist()


def test_ema_against_its_recursion():
    layer = torch.nn.Linear(3, 2)
    found = ema_decays(resolve(TINY, {"train": {"ema_rampup": 0}}).train)
    decays = {name: decay(0) for name, decay in found.items()}
    assert decays == {"0.9": 0.9, "64img": pytest.approx(0.5 ** (16 / 64))}
    ema, expected = EMA(layer, found), {name: layer.weight.detach().double().clone() for name in decays}
    for step in range(5):
        with torch.no_grad():
            layer.weight.add_(step + 1.0)
        ema.update(16 * step)
        for name, decay in decays.items():
            expected[name] = decay * expected[name] + (1 - decay) * layer.weight.detach().double()
    for name in decays:
        torch.testing.assert_close(ema.state_dict(name)["weight"].double(), expected[name], rtol=1e-6, atol=1e-6)
    # half-life: after that many images, half of the weight is left
    assert decays["64img"] ** (64 / 16) == pytest.approx(0.5)


def test_learning_rate_warms_up_then_stays():
    settings = resolve(TINY).optimizer
    assert learning_rate(settings, 0, 160) == pytest.approx(1e-3 / 33)
    assert learning_rate(settings, 32, 160) == learning_rate(settings, 10**9, 160) == 1e-3
