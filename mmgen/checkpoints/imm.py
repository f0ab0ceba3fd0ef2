"""Key names of the official IMM networks (and of EDM's, which they extend) against ours.

official                              ours                        note
model.map_layer0 / map_layer1         time_mlp.linear0 / .linear1
model.map_layer0_s / map_layer1_s     second_time_mlp....         absent in EDM's own networks
model.map_label, map_augment          label_embed, augment_embed
model.map_noise.freqs                 frequencies                 Fourier embedding only
model.enc.X, model.dec.X              encoder.X, decoder.X        blocks have the same names
model.enc.X_aux_residual.weight       encoder.X_aux_residual.conv.weight
model.dec.RxR_aux_norm / aux_conv     out_norm / out_conv
*.resample_filter                     (checked, not kept)         a constant of the architecture
model.t_embedder.mlp.0 / .2           time_mlp.linear0 / .linear1 DiT from here on
model.s_embedder.mlp.0 / .2           second_time_mlp....
model.x_embedder.proj                 patch_embed
model.y_embedder.embedding_table      label_embed
model.pos_embed                       position
model.blocks.N.attn.qkv / .proj       blocks.N.qkv / .proj
model.blocks.N.mlp.fc1 / .fc2         blocks.N.fc1 / .fc2
model.blocks.N.adaLN_modulation.1     blocks.N.modulation
model.final_layer.adaLN_modulation.1  out_modulation
model.final_layer.linear              out
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..errors import ModelError

_RULES = [
    (r"map_layer([01])_s\.", r"second_time_mlp.linear\1."),
    (r"map_layer([01])\.", r"time_mlp.linear\1."),
    (r"map_label\.", "label_embed."),
    (r"map_augment\.", "augment_embed."),
    (r"map_noise\.freqs$", "frequencies"),
    (r"enc\.(\w+_aux_residual)\.", r"encoder.\1.conv."),
    (r"enc\.", "encoder."),
    (r"dec\.\d+x\d+_aux_norm\.", "out_norm."),
    (r"dec\.\d+x\d+_aux_conv\.", "out_conv."),
    (r"dec\.", "decoder."),
    (r"t_embedder\.mlp\.0\.", "time_mlp.linear0."),
    (r"t_embedder\.mlp\.2\.", "time_mlp.linear1."),
    (r"s_embedder\.mlp\.0\.", "second_time_mlp.linear0."),
    (r"s_embedder\.mlp\.2\.", "second_time_mlp.linear1."),
    (r"x_embedder\.proj\.", "patch_embed."),
    (r"y_embedder\.embedding_table\.", "label_embed."),
    (r"pos_embed$", "position"),
    (r"blocks\.(\d+)\.(?:attn|mlp)\.", r"blocks.\1."),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.", r"blocks.\1.modulation."),
    (r"final_layer\.adaLN_modulation\.1\.", "out_modulation."),
    (r"final_layer\.linear\.", "out."),
]

FILTERS = {2: [0.5, 0.5], 4: [0.125, 0.375, 0.375, 0.125]}  # the resampling filters that our U-Net has


def our_key(key: str) -> str:
    """Our name of an official key."""
    key = key.removeprefix("model.")
    for pattern, replacement in _RULES:
        ours, count = re.subn("^" + pattern, replacement, key)
        if count:
            return ours
    raise ModelError(f"no tensor of ours corresponds to {key!r}")


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under our key names. Raises ModelError for a key or a resampling filter that we do not have."""
    ours = {}
    for key, value in state.items():
        if key.endswith(".resample_filter"):
            taps = torch.tensor(FILTERS.get(value.shape[-1], []), dtype=value.dtype)
            if value.shape[-2:] != (len(taps), len(taps)) or not torch.allclose(value[0, 0], taps.outer(taps)):
                raise ModelError(f"{key} is a resampling filter that is not [1, 1] or [1, 3, 3, 1]")
            continue
        ours[our_key(key)] = value
    return ours
