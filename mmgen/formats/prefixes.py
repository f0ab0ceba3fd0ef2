"""Where in a training module the network is: Lightning and others store it as `model.`, `net.` and so on, beside other parts."""

from __future__ import annotations

from typing import Any

from ..errors import ModelError

# One name of each family's network, as its own code has it
_MARKS = (
    "model.map_layer0.weight",
    "model.s_embedder.mlp.0.weight",
    "unet.emb_fourier.freqs",
    "x_embedder.proj.weight",
    "input_blocks.0.0.weight",
    "time_embedding.linear_1.weight",
    "pos_embed.proj.weight",
)
_USUAL = ("model.", "net.", "network.", "denoiser.", "unet.", "transformer.", "module.")
_REASON = "another part of the training module"


def network_in(tensors: dict[str, Any], weights: str, path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of the network without the prefix that a training module puts before them, and those left out.

    If there are two networks, `weights` "ema" takes the averaged one (with "ema" in its name). Tensors of no known network are
    returned unchanged. Raises ModelError if several networks could be meant.
    """
    for mark in _MARKS:
        prefixes = [key.removesuffix(mark) for key in tensors if key.endswith(mark)]
        prefixes = [prefix for prefix in prefixes if prefix == "" or prefix.endswith(".")]
        if "" in prefixes:
            return tensors, {}
        if prefixes:
            prefix = _chosen(prefixes, weights, path)
            inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            return inside, {key: _REASON for key in tensors if not key.startswith(prefix)}
    return tensors, {}


def _chosen(prefixes: list[str], weights: str, path: str) -> str:
    averaged = [prefix for prefix in prefixes if "ema" in prefix.lower()]
    plain = [prefix for prefix in prefixes if prefix not in averaged]
    candidates = (averaged if weights == "ema" else plain) or plain or averaged
    usual = [prefix for prefix in _USUAL if prefix in candidates]
    if len(candidates) > 1 and not usual:
        names = ", ".join(ascii(prefix)[1:-1] for prefix in candidates[:4])
        raise ModelError(f"{path} holds several networks ({names}): save the state dict of the one that is meant")
    return candidates[0] if len(candidates) == 1 else usual[0]
