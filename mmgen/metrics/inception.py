"""The Inception network of the FID, in the three ways in which papers and tools bring images to it.

mode    images come to 299 x 299 by                              network                               in clean-fid
tf      TensorFlow 1's bilinear, inside the network              inception-2015-12-05.pt               legacy_tensorflow
clean   Pillow's bicubic with antialias, in float per channel    inception-2015-12-05.pt, its layers   clean
torch   torch's bilinear without antialias                       pt_inception-2015-12-05-6726825d.pth  legacy_pytorch

"tf" is the protocol of EDM, StyleGAN and, up to rounding, ADM. clean-fid supplies the resizers and the network of "torch";
the TorchScript file is called as clean-fid calls it. Scores of different modes cannot be compared. The modes and why they
differ: Parmar, Zhang and Zhu, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation" (2022).
"""

from __future__ import annotations

import contextlib
import pickle
import platform
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, MmgenError, ModelError, nearest
from ..formats.network_file import STATE_DICT, TORCHSCRIPT, check_torchscript, content
from .published_file import Located, Progress, Published, locate

SCRIPT = "inception-2015-12-05.pt"
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
MODES = {"tf": SCRIPT, "clean": SCRIPT, "torch": WEIGHTS}  # and the file of each
PUBLISHED = {
    SCRIPT: "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    WEIGHTS: "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
}
URLS = {
    SCRIPT: f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{SCRIPT}",
    WEIGHTS: f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}",
}
FEATURES = 2048
_replacing_the_loader = threading.Lock()


@dataclass(frozen=True)
class Inception:
    """The network in one mode; `extract`, `prepare` and `probabilities` as in `features.Extractor`."""

    weights: Located
    prepare: Callable[[np.ndarray], np.ndarray] | None
    extract: Callable[[Tensor], Tensor]
    probabilities: Callable[[Tensor], Tensor] | None


def build_inception(
    mode: str,
    device: torch.device | str = "cpu",
    *,
    file: Path | None = None,
    progress: Progress | None = None,
) -> Inception:
    """Finds the weights (`published_file.locate`) and loads the network of a mode.

    Args:
        file: the weights, or a folder that holds them; None: $MMGEN_INCEPTION, the cache, clean-fid's own place, or else
            the published file, downloaded into the cache.

    Raises ConfigError for an unknown mode, ModelError where the weights are missing, damaged or of another kind.
    """
    if mode not in MODES:
        raise ConfigError(f"mode {mode!r} is unknown: {nearest(mode, MODES)}")
    name = MODES[mode]
    weights = locate(
        Published(name, URLS[name], PUBLISHED[name], option="--inception", variable="MMGEN_INCEPTION"),
        file,
        others=[other for other in PUBLISHED if other != name],
        elsewhere=_elsewhere(name),
        progress=progress,
    )
    wanted = TORCHSCRIPT if name == SCRIPT else STATE_DICT
    if (found := content(weights.path)) != wanted:
        raise ModelError(f"{weights.path} is {found}, and mode {mode} takes {wanted} (the published {name})")
    if mode == "torch":
        return Inception(weights, _resizer("legacy_pytorch"), _extract_by_weights(weights.path, device), None)
    network = load_torchscript(weights.path, device)
    if "return_features" not in [argument.name for argument in network.forward.schema.arguments]:
        raise ModelError(
            f"{weights.path} takes no return_features, as {SCRIPT} does: another network goes with --features {weights.path}"
        )
    _speed_up(network, device)
    probabilities = _probabilities(network)
    if mode == "clean":
        return Inception(weights, _resizer("clean"), _extract_by_layers(network, weights.path), probabilities)
    return Inception(weights, None, _extract_resizing(network, weights.path), probabilities)


def load_torchscript(path: Path, device: torch.device | str) -> torch.jit.ScriptModule:
    """A TorchScript in evaluation mode. Raises ModelError where torch cannot read it, or it would access files."""
    check_torchscript(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.load is deprecated, but the published network is of its format
        try:
            return torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise ModelError(f"{path} is damaged, or not a TorchScript that this torch reads: {_last_line(error)}") from error


@contextlib.contextmanager
def refusing(path: Path, images: Tensor) -> Iterator[None]:
    """Turns what a network says about images that it cannot take into a ModelError that names its file."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MmgenError(f"{len(images)} images at a time do not fit into the memory: try a smaller batch size") from error
    except RuntimeError as error:
        shape = "x".join(map(str, images.shape))
        raise ModelError(f"{path} cannot take images of {shape}, {images.dtype}: {_last_line(error)}") from error


def _speed_up(network: torch.jit.ScriptModule, device: torch.device | str) -> None:
    """Puts channels last: on a CPU convolutions then run 1.5 times as fast, and features differ by rounding, 5e-6 of them.

    A network that depends on the order of its memory, which the published one is not known to, keeps its own.
    """
    if torch.device(device).type != "cpu":
        return
    network.to(memory_format=torch.channels_last)
    try:
        with torch.no_grad(), torch.jit.optimized_execution(False):  # leaves no compiled code for one image behind
            network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), return_features=True)
    except RuntimeError:
        network.to(memory_format=torch.contiguous_format)


def _extract_resizing(network: torch.jit.ScriptModule, path: Path) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        with refusing(path, images):
            return network(images, return_features=True).view(len(images), FEATURES)

    return extract


def _extract_by_layers(network: torch.jit.ScriptModule, path: Path) -> Callable[[Tensor], Tensor]:
    if not hasattr(network, "layers"):
        raise ModelError(f"{path} has no layers, as {SCRIPT} has: another network goes with --features {path}")

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        with refusing(path, images):
            return network.layers((images - 128) / 128).view(len(images), FEATURES)

    return extract


def _probabilities(network: torch.jit.ScriptModule) -> Callable[[Tensor], Tensor] | None:
    """Features [N, 2048] to classes [N, 1008], without the bias of the last layer, as StyleGAN's Inception Score."""
    weight = getattr(getattr(network, "output", None), "weight", None)
    if weight is None or weight.ndim != 2 or weight.shape[1] != FEATURES:
        return None
    weight = weight.detach().to(torch.float32)

    @torch.no_grad()
    def probabilities(features: Tensor) -> Tensor:
        return torch.softmax(features.to(weight) @ weight.T, dim=1)

    return probabilities


def _extract_by_weights(path: Path, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    network = _clean_fid_network(path).to(device).eval()
    if torch.device(device).type == "cpu":
        network.to(memory_format=torch.channels_last)  # as in _speed_up

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        with refusing(path, images):
            return network(images / 255)[0].squeeze(-1).squeeze(-1)

    return extract


def _clean_fid_network(path: Path) -> nn.Module:
    """clean-fid's own network of pytorch-fid's weights, which come from the file and not from clean-fid's download."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ModelError(f"{path} holds more than weights, or is damaged: {_first_line(error)}") from error
    module = _clean_fid("inception_pytorch")
    # The class downloads in its constructor, by this function of its module; nothing else goes by it meanwhile.
    with _replacing_the_loader, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, about the way clean-fid calls it
        original = module.load_state_dict_from_url
        module.load_state_dict_from_url = lambda *_, **__: state
        try:
            return module.InceptionV3(output_blocks=[3], resize_input=False)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} does not hold the weights of {WEIGHTS}: {_first_line(error)}") from error
        finally:
            module.load_state_dict_from_url = original


def _resizer(mode: str) -> Callable[[np.ndarray], np.ndarray]:
    """clean-fid's resizer: one image uint8 [H, W, 3] to float32 [299, 299, 3] of 0 to 255."""
    resize = _clean_fid("resize")
    with warnings.catch_warnings():  # clean-fid switches all warnings off, for good
        return resize.build_resizer(mode)


def _clean_fid(name: str) -> ModuleType:
    """A module of clean-fid. Its `fid` is never imported: it needs SciPy."""
    import importlib

    try:
        return importlib.import_module("cleanfid." + name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "cleanfid":
            raise ConfigError(f"clean-fid cannot be loaded, as {error.name} is missing: pip install {error.name}") from error
        raise ConfigError("modes clean and torch need clean-fid: pip install clean-fid") from error
    except (ImportError, RuntimeError, OSError) as error:
        raise MmgenError(
            f"clean-fid cannot load torchvision ({_first_line(error)}): torch and torchvision must match, so install both "
            "anew with one command, pip install --upgrade torch torchvision"
        ) from error


def _elsewhere(name: str) -> list[Path]:
    """Where clean-fid keeps the file itself."""
    if name == WEIGHTS:
        return [Path(torch.hub.get_dir()) / "checkpoints"]
    own = Path("./" if platform.system() == "Windows" else "/tmp")
    return list(dict.fromkeys([own, Path(tempfile.gettempdir())]))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _last_line(error: Exception) -> str:
    """Where TorchScript, whose messages begin with a traceback, says what went wrong."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
