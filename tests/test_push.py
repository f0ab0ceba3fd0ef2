"""Model cards, and what `mmgen push` sends to the hub: with a stand-in for the hub that records it."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import typer
from typer.testing import CliRunner

from mmgen.cli.push import push as command
from mmgen.models.denoiser import DenoiserSettings
from mmgen.errors import ConfigError, MmgenError, ModelError
from mmgen.diffusion.flow_map import FlowMapSettings
from mmgen.models.latents import LatentSettings
from mmgen.report.model_card import LICENCES, SOURCES, model_card
from mmgen.models.build import build_model
from mmgen.models.config import ModelConfig
from mmgen.models.files import save_model
from mmgen.networks import DiTSettings, UNetSettings
from mmgen.report.push import push

DIT = DiTSettings(hidden_size=16, depth=1, num_heads=2)
FLOW = FlowMapSettings("fm", "euler_fm", t_min=0.0, t_max=0.994)
IMM = ModelConfig(DIT, FLOW, 8, 1, 10, data="digits", training={"images": 1000, "ema": "0.9999", "loss": {"k": 12}})


def header(card: str) -> dict:
    """The YAML between the first two rulers, which is plain keys and one list."""
    _, text, body = card.split("---\n", 2)
    content: dict = {}
    for line in text.splitlines():
        if line.startswith("- "):
            content["tags"].append(line[2:])
        else:
            key, value = line.split(":", 1)
            content[key] = value.strip() or []
    assert body.startswith("\n# ")
    return content


def test_card_of_a_trained_model():
    card = model_card(IMM, {"repository": "someone/digits"})
    top = header(card)
    assert top["library_name"] == "mmgen" and "license" not in top
    assert "inductive-moment-matching" in top["tags"] and "class-conditional" in top["tags"]
    assert "# digits\n" in card and "8 x 8 grey images, 10 classes" in card
    assert "mmgen sample hf://someone/digits --steps 1,2,4" in card and 'mmgen.load("hf://someone/digits")' in card
    assert "| images | 1000 |" in card and "| data | digits |" in card and "Not stated" in card


def test_card_of_a_converted_model():
    latents = LatentSettings(vae="stabilityai/sd-vae-ft-ema", vae_sha256="", mean=(0.0,) * 4, std=(5.5,) * 4, target_std=1.0)
    config = ModelConfig(DIT, None, 32, 4, 1000, denoiser=DenoiserSettings("discrete"), latents=latents)
    provenance = {
        "file": "DiT|XL.pt", "sha256": "ab" * 32, "container": "torch .pt (zip)", "family": "dit", "mmgen_version": "0.0.7",
        "left_out": {"a": "optimizer state", "b": "optimizer state", "c": "a projector"},
    }  # fmt: skip
    card = model_card(config, provenance)
    assert header(card)["license"] == "cc-by-nc-4.0" and "CC BY-NC 4.0" in card
    for part in ("DiT\\|XL.pt", "ab" * 32, "mmgen 0.0.7", "* optimizer state (2 entries)", "* a projector (1 entry)",
                 "256 x 256 colour images, 1000 classes", "stabilityai/sd-vae-ft-ema", "mmgen[latents]", "--sampler ddim",
                 "arxiv.org/abs/2212.09748"):  # fmt: skip
        assert part in card, part


def test_card_where_the_licence_is_unknown():
    config = ModelConfig(UNetSettings(), None, 32, 3, denoiser=DenoiserSettings("edm"))
    for family in ("imm", "diffusers-unet2d"):
        top = header(card := model_card(config, {"family": family}))
        assert top["license"] == "other" and top["license_name"] == "unknown-see-the-source" and "Unknown" in card
    assert "--sampler heun" in card and "no classes" in card
    assert LICENCES.keys() <= SOURCES.keys() and LICENCES["edm"][0] == LICENCES["edm2"][0] == "cc-by-nc-sa-4.0"


# Push


@pytest.fixture
def hub(monkeypatch):
    """Records what is asked of the hub; `error` is raised when it is asked for anything."""
    record = SimpleNamespace(created=None, files={}, message=None, cards=False, private=False, error=None)

    class Api:
        def __init__(self, token):
            record.token = token

        def create_repo(self, repository, private, exist_ok):
            if record.error:
                raise record.error
            record.created = (repository, private, exist_ok)
            return f"https://huggingface.co/{repository}"

        def model_info(self, repository):
            return SimpleNamespace(private=record.private)

        def file_exists(self, repository, name):
            return record.cards

        def create_commit(self, repository, operations, commit_message):
            for one in operations:
                with one.as_file() as file:
                    record.files[one.path_in_repo] = file.read()
            record.message = commit_message

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return record


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "digits"
    torch.manual_seed(0)
    save_model(folder / "model.safetensors", IMM, build_model(IMM).network.state_dict())
    for name in ("samples.png", "config.json", "log.jsonl", "model-ema-0.999.safetensors"):
        (folder / name).write_bytes(name.encode())
    (folder / "checkpoints").mkdir()
    return folder


def test_push(hub, run):
    """The weights, a card and the pictures that are there; nothing else of the run."""
    done = push(run, "hf://someone/digits")
    assert hub.created == ("someone/digits", None, True) and hub.token == "hf_test"
    assert hub.files.keys() == set(done.files) == {"model.safetensors", "README.md", "samples.png"}
    assert hub.files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert b"hf://someone/digits" in hub.files["README.md"] and hub.message == "model.safetensors by mmgen push"
    assert done.url == "https://huggingface.co/someone/digits" and not done.kept_card
    assert not (run / "README.md").exists()


def test_a_file_is_pushed_under_the_name_that_is_looked_for(hub, tmp_path):
    provenance = {"converted": {"family": "sit", "file": "sit.pt"}}
    config = ModelConfig(DIT, None, 8, 1, 10, denoiser=DenoiserSettings("flow"), training=provenance)
    save_model(tmp_path / "sit.safetensors", config, build_model(config).network.state_dict())
    (tmp_path / "README.md").unlink(missing_ok=True)
    push(tmp_path / "sit.safetensors", "a/b", message="first")
    assert hub.files.keys() == {"model.safetensors", "README.md"} and hub.message == "first"
    assert b"license: mit" in hub.files["README.md"] and b"sit.pt" in hub.files["README.md"]


def test_cards_that_somebody_wrote_are_kept(hub, run):
    hub.cards = True
    assert push(run, "a/b").kept_card and "README.md" not in hub.files
    (run / "README.md").write_text("mine")
    assert not push(run, "a/b").kept_card and hub.files["README.md"] == b"mine"


def test_private(hub, run):
    with pytest.raises(ConfigError, match="a/b exists already and is public"):
        push(run, "a/b", private=True)
    assert hub.files == {}
    hub.private = True
    push(run, "a/b", private=True)
    assert hub.created == ("a/b", True, True) and hub.files


class Refusal(Exception):
    def __init__(self, status):
        super().__init__(f"{status} Client Error\nrequest id")
        self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    "error, message",
    [
        (Refusal(401), "does not accept the token: run `hf auth login`"),
        (Refusal(403), "write access"),
        (Refusal(429), r"the hub refuses \(429 Client Error\)"),
        (OSError("no route to host"), r"cannot push to a/b: the hub cannot be reached \(no route to host\)"),
        (ValueError(), r"the hub cannot be reached \(ValueError\)"),
    ],
)
def test_the_hub_says_no(hub, run, error, message):
    hub.error = error
    with pytest.raises(MmgenError, match=message) as raised:
        push(run, "a/b")
    assert "\n" not in str(raised.value)


def test_refused_before_the_hub_is_asked(hub, run, tmp_path, monkeypatch):
    hub.error = AssertionError("asked")
    for name in ("digits", "a/b/c", "a b/c", "/b", "a/", "a/b--c", "../b"):
        with pytest.raises(ConfigError, match="use user/name"):
            push(run, name)
    (tmp_path / "empty").mkdir()
    for place, message in ((tmp_path / "empty", "without model.safetensors"), ("someone/else", "no run folder or model file")):
        with pytest.raises(ModelError, match=message):
            push(place, "a/b")
    with pytest.raises(ModelError, match="cannot be read"):
        push(run / "log.jsonl", "a/b")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="needs a token: run `hf auth login`"):
        push(run, "a/b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MmgenError, match="HF_HUB_OFFLINE is set"):
        push(run, "a/b")


def test_command(hub, run):
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(run), "a/b", "--message", "hello"])
    assert result.exit_code == 0 and hub.message == "hello"
    assert "https://huggingface.co/a/b: model.safetensors, samples.png, README.md" in result.output
    assert "mmgen sample hf://a/b" in result.output
