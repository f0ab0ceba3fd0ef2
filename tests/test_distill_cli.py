"""`mmgen distill` as typed: presets, refusals, the dry run, and a whole run with its table, its samples and its figure."""

import json

import pytest
from accelerate.state import AcceleratorState
from tiny_model import make_denoiser, make_model
from typer.testing import CliRunner

from mmgen.cli import app
from mmgen.config.sections import preset_for, preset_names, presets_by_size, read_preset
from mmgen.models.denoiser import DenoiserSettings
from mmgen.config.distill import resolve
from mmgen.errors import MmgenError
from mmgen.diffusion.schedules import ScheduleSettings

V = DenoiserSettings(precondition="schedule", prediction="v", schedule=ScheduleSettings("vp_cosine"), time_scale=100.0)
SHORT = (
    "--batch-size",
    "16",
    "--batch-per-device",
    "16",
    "--eval-num",
    "0",
    "--set",
    "optimizer.warmup_images=0",
    "--device",
    "cpu",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_denoiser(tmp_path_factory.mktemp("teacher") / "teacher.safetensors", V, channels=1, num_classes=10)


def invoke(*arguments):
    """The result of a command; its error, if any, is the sentence that `mmgen` prints."""
    return CliRunner().invoke(app, ["distill", *map(str, arguments)])


def test_every_preset_is_a_whole_recipe():
    names = preset_names("distill")
    ours = {"emoji32-distill", "pixart512-distill", "sd15-distill", "sd15-distill-lora", "sd3-distill-lora", "sdxl-distill-lora"}
    paper = ["cifar10-distill", "digits-distill", "digits-text-distill", "imagenet128-distill", "imagenet64-distill", "t2i512-distill"]
    assert set(names) == {*paper, *ours}
    assert presets_by_size("distill") == {64: "imagenet64-distill", 128: "imagenet128-distill"}
    assert [preset_for("distill", word) for word in ("digits", "cifar10", "uoft-cs/cifar10", "imagenet")] == [
        "digits-distill", "cifar10-distill", "cifar10-distill", None]  # fmt: skip
    for name in names:
        config = resolve(read_preset(name, "distill"))
        optimizer, train = config.optimizer, config.train
        assert (optimizer.name, optimizer.beta1, optimizer.beta2, optimizer.eps) == ("adam", 0.0, 0.99, 1e-12)
        assert (optimizer.decay, optimizer.grad_clip, train.ema_half_lives) == ("linear", 1.0, ())
        assert config.run.eval_steps == (8,) and config.data.label_dropout == 0 and config.data.augment == 0
        if name in paper:
            assert train.ema_betas == () and optimizer.warmup_images in (50 * train.batch_size, 1000 * train.batch_size)


def test_the_published_recipe():
    """Page 2.2 of the notes on the paper: batch 2048, 410M images, learning rate 2e-6, warm-up of 1,000 steps."""
    config = resolve(read_preset("imagenet64-distill", "distill"))
    assert (config.train.batch_size, config.train.max_images // 2048, config.optimizer.lr) == (2048, 200_000, 2e-6)
    assert config.optimizer.warmup_images == 2_048_000 and config.loss.weighting == "output"


def test_help_names_the_methods():
    result = invoke("--help")
    assert result.exit_code == 0 and "alternating" in result.output and "instant" in result.output


@pytest.mark.parametrize(("arguments", "message"), [
    ((), "needs a teacher"),
    (("--teacher", "TEACHER", "--method", "instnat"), "did you mean 'instant'"),
    (("--teacher", "TEACHER", "--posterior", "none"), "unknown --posterior"),
    (("--teacher", "TEACHER", "--schedule", "cosine"), "did you mean 'vp_cosine'"),
    (("--teacher", "TEACHER", "--steps", "0"), "student.steps"),
    (("--teacher", "TEACHER", "--preset", "digits-imm"), "is for `mmgen train-imm`"),
    (("--teacher", "TEACHER", "--set", "loss.metod=instant"), "loss.metod"),
    (("--teacher", "TEACHER", "--max-time", "2"), "--max-time"),
    (("--teacher", "./nowhere.pt"), "nowhere.pt"),
    (("--teacher", "FLOWMAP"), "teacher"),
])  # fmt: skip
def test_refusals_are_a_sentence(tmp_path, place, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    flow_map = make_model(tmp_path / "imm.safetensors", channels=1)
    result = invoke(*({"TEACHER": place, "FLOWMAP": flow_map}.get(word, word) for word in arguments), "--device", "cpu")
    assert isinstance(result.exception, MmgenError) and message in str(result.exception), result.exception
    assert "\n" not in str(result.exception) and not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "sets"), [("alternating", "2 trained, 1 frozen"), ("instant", "1 trained, 3 frozen")])
def test_a_dry_run_tells_memory_and_trains_nothing(tmp_path, place, monkeypatch, method, sets):
    monkeypatch.chdir(tmp_path)
    result = invoke("--teacher", place, "--method", method, "--dry-run")
    assert result.exit_code == 0, result.exception
    assert sets in result.output and "memory per device" in result.output and "digits-distill" in result.output
    assert result.output.count("LoRA of rank 64") == 2 and result.output.count("all weights") == 2  # with and without checkpointing
    by_lora = invoke("--teacher", place, "--method", method, "--lora", "3", "--dry-run").output
    assert by_lora.index("LoRA of rank 3") < by_lora.index("all weights") and "1 frozen, shared" in by_lora
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_preset_follows_the_data_then_the_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = make_denoiser(tmp_path / "teacher.safetensors", V, channels=1)
    result = invoke("--teacher", other, "--data", "elsewhere", "--dry-run")
    assert "preset imagenet64-distill" in result.output
    assert "elsewhere" in str(result.exception) + result.output
    assert "preset digits-distill" in invoke("--teacher", other, "--dry-run").output


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, and a fresh process as far as accelerate is concerned."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMGEN_INCEPTION", "")
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)


def mmgen(*arguments):
    """A command that succeeds."""
    AcceleratorState._reset_state(reset_partial_state=True)
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.exception or result.output
    return result


def test_a_run_ends_with_the_table_and_its_student_is_a_model(folder, place):
    """The second call finds it finished."""
    command = (
        "distill", "--teacher", place, "--steps", "2", *SHORT, "--max-images", "64", "--eval-num", "40", "--teacher-steps", "4",
        "--out", "run",
    )  # fmt: skip
    done = mmgen(*command)
    assert "teacher at its best" in done.stdout and "student" in done.stdout and "mmgen sample run" in done.stdout
    rows = json.loads((folder / "run/results.json").read_text())["comparison"]["rows"]
    for row in rows:
        assert f"{row['value']:.3f}" in done.stdout
    sampled = mmgen("sample", "run", "--num", "4", "--out", "samples.png")
    assert (folder / "samples.png").is_file() and "warning" not in sampled.stderr
    record = json.loads((folder / "samples.png.json").read_text())
    assert (record["steps"], record["sampler"], record["nfe"]) == (2, "ancestral", 2)
    more = mmgen("sample", "run", "--num", "4", "--steps", "4", "--out", "more.png")
    assert "distilled for 2 steps" in more.stderr
    again = mmgen(*command)
    assert '"student, 2 ancestral' in done.stderr and '"student, 2' not in again.stderr and "teacher at its best" in again.stdout


@pytest.mark.slow
def test_the_default_folder_is_the_same_for_the_same_settings(folder, place):
    for _ in range(2):
        mmgen("distill", "--teacher", place, *SHORT, "--max-images", "32")
    (run,) = (folder / "runs").iterdir()
    assert run.name.startswith("digits-distill-")
