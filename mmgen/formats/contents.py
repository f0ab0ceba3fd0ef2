"""Which of a file's contents are the weights that are meant, what the file says of their network, and what is left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..errors import ModelError
from .safe_pickle import Holder, StoredTensor

AVERAGED = ("ema", "model_ema", "ema_model", "ema_state_dict", "model_ema_state_dict", "net_ema")
PLAIN = ("model", "state_dict", "net", "model_state_dict", "network", "unet", "module")
_PREFIXES = ("module.", "_orig_mod.")
_MOST_ARGUMENTS = 200_000  # parts of what a file says of itself: shared lists would multiply
_MOST_MODULES = 20_000
_LONGEST_NAME = 200  # of a module or parameter: names are put together along a path of modules
_REASONS = {
    "opt": "optimizer state",
    "scaler": "state of the loss scaler",
    "lr_scheduler": "state of the learning rate schedule",
    "scheduler": "state of the learning rate schedule",
    "loss_fn": "the training loss",
    "augment_pipe": "augmentation of the training images",
    "encoder": "the encoder of the training images",
    "vae": "the encoder of the training images",
}


@dataclass
class Chosen:
    """Weights picked out of a file: tensors that may not have been read yet."""

    tensors: dict[str, StoredTensor]
    arguments: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def choose(value: Any, weights: str, path: str) -> Chosen:
    """The averaged weights (`weights` "ema") or the others ("model") of what a file holds; a file with one kind gives that for
    "ema". Prefixes of wrappers are stripped. Raises ModelError where nothing in it is a set of weights."""
    if type(value) is Holder and "_parameters" in (value.state or {}):
        value = {"model": value}
    if type(value) is not dict:
        raise ModelError(f"{path} holds {_in_words(value)}, and no weights by name")
    sets = {key: found for key in (*AVERAGED, *PLAIN) if (found := _weights_of(value.get(key), path))}
    averaged, plain = [k for k in AVERAGED if k in sets], [k for k in PLAIN if k in sets]
    _refuse_training_state(value, averaged, path)
    if not sets:
        flat = _weights_of(value, path)
        if not flat:
            raise ModelError(f"{path} {_no_weights(value)}")
        rest = {key: item for key, item in value.items() if key not in flat}
        chosen = Chosen(flat)
    else:
        if weights == "model" and not plain:
            raise ModelError(f"{path} holds averaged weights only ({averaged[0]!r}): leave out --weights model")
        unread = [k for k in AVERAGED if value.get(k) is not None and k not in sets]
        if weights == "ema" and not averaged and unread:
            raise ModelError(f"{path} keeps its average {unread[0]!r} in an unknown layout; --weights model takes the others")
        name = averaged[0] if weights == "ema" and averaged else plain[0]
        chosen = Chosen(sets[name])
        if type(value[name]) is Holder:
            chosen.arguments.update(constructor_arguments(value[name]))
        elif chosen.tensors.keys() <= value[name].keys():
            chosen.left_out.update({f"{name}.{_word(k)}": "not a tensor" for k in value[name] if k not in chosen.tensors})
        rest = {key: item for key, item in value.items() if key != name}
    _sort_out(rest, chosen, averaged, plain)
    chosen.tensors = _without_prefixes(chosen, path)
    return chosen


def _weights_of(value: Any, path: str, depth: int = 0) -> dict[str, StoredTensor] | None:
    """The tensors of a module or of a (nested) state dict; None where there are none."""
    if type(value) is Holder:
        return _flatten(value, path) or None
    if type(value) is not dict:
        return None
    tensors = {key: item for key, item in value.items() if type(item) is StoredTensor and type(key) is str}
    if tensors and (depth or len(tensors) > 1 or len(tensors) == len(value)):
        return tensors
    for key in (*AVERAGED, *PLAIN) if depth == 0 else ():
        inner = value.get(key)
        if type(inner) is dict and (found := _weights_of(inner, path, 1)):
            return found
    return None


def _flatten(holder: Holder, path: str) -> dict[str, StoredTensor]:
    """The state dict of a module, with its other buffers: `_parameters`, `_buffers`, and those of its `_modules`."""
    found: dict[str, StoredTensor] = {}
    open_modules: list[tuple[str, Holder]] = [("", holder)]
    visited = 0
    while open_modules:
        prefix, module = open_modules.pop()
        visited += 1
        if visited > _MOST_MODULES or len(prefix) > 10 * _LONGEST_NAME:
            raise ModelError(f"{path} has more modules in each other than any network: not opened")
        state = module.state if type(module.state) is dict else {}
        for kind in ("_parameters", "_buffers"):
            for name, tensor in _members(state, kind):
                if type(tensor) is StoredTensor:
                    found[prefix + name] = tensor
                elif tensor is not None:
                    raise ModelError(f"{path} has {prefix}{name} in a layout that is not known: not opened")
        below = [(f"{prefix}{name}.", item) for name, item in _members(state, "_modules") if type(item) is Holder]
        open_modules.extend(reversed(below))
    return found


def _members(state: dict, kind: str) -> list[tuple[str, Any]]:
    members = state.get(kind)
    members = list(members.items()) if type(members) is dict else []
    if any(type(name) is not str or len(name) > _LONGEST_NAME for name, _ in members):
        raise ModelError("the file has a module whose parts have impossible names: not opened")
    return members


def constructor_arguments(holder: Holder) -> dict[str, Any]:
    """{"class_name", "init_kwargs", "attributes", "modules"} of a persistent object, nested as its modules are. `attributes`: the
    numbers, words and lists that its constructor kept, such as sigma_data, with defaults filled in."""
    return _Plain().constructor(holder)


def plain(value: Any) -> Any:
    """A value of a file as dicts, lists, numbers and words."""
    return _Plain().of(value)


class _Plain:
    def __init__(self) -> None:
        self.parts = 0

    def count(self) -> None:
        self.parts += 1
        if self.parts > _MOST_ARGUMENTS:
            raise ModelError("the file says more of itself than any checkpoint does: not opened")

    def of(self, value: Any) -> Any:
        self.count()
        if type(value) is dict:
            return {_word(key): self.of(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return [self.of(item) for item in value]
        if isinstance(value, (np.generic, np.ndarray)):
            self.parts += value.size
            return value.tolist() if value.size <= 10_000 else f"an array of shape {value.shape}"
        if type(value) is StoredTensor:
            return f"a tensor of shape {list(value.shape)}"
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if type(value) is Holder:
            if value.persistent:
                return self.constructor(value)
            if value.name == "argparse.Namespace":
                return self.of(value.state or {})
            return self.of(value.arguments[0]) if len(value.arguments) == 1 else value.name
        if type(value) is bytes:
            return f"{len(value)} bytes"
        return _word(value) if type(value) is int and value.bit_length() > 64 else value

    def constructor(self, holder: Holder) -> dict[str, Any]:
        self.count()
        state = holder.state if type(holder.state) is dict else {}
        done: dict[str, Any] = {"class_name": holder.name.rsplit(".", 1)[-1]}
        if type(state.get("_init_kwargs")) is dict:
            done["init_kwargs"] = self.of(state["_init_kwargs"])
        if state.get("_init_args"):
            done["init_args"] = self.of(state["_init_args"])
        kept = {k: v for k, v in state.items() if type(k) is str and not k.startswith("_") and k != "training"}
        simple = (bool, int, float, str, list, tuple, dict)
        attributes = {k: self.of(v) for k, v in kept.items() if type(v) in simple or isinstance(v, (np.generic, np.ndarray))}
        if attributes:
            done["attributes"] = attributes
        modules = {name: self.constructor(item) for name, item in _members(state, "_modules") if type(item) is Holder}
        modules = {name: item for name, item in modules.items() if "init_kwargs" in item or "modules" in item}
        if modules:
            done["modules"] = modules
        return done


def _sort_out(rest: dict, chosen: Chosen, averaged: list[str], plain_ones: list[str]) -> None:
    """Everything beside the weights is an argument, or is left out with its reason."""
    for key, item in rest.items():
        name = _word(key)
        if item is None:
            continue
        if name in averaged:
            chosen.left_out[name] = "averaged weights, and others were chosen"
        elif name in plain_ones:
            chosen.left_out[name] = "the weights that are not averaged"
        elif reason := next((text for start, text in _REASONS.items() if name.startswith(start)), None):
            chosen.left_out[name] = reason
            if type(item) is Holder and item.persistent:
                chosen.arguments.setdefault("entries", {})[name] = constructor_arguments(item)
        elif (type(item) is Holder and item.name == "argparse.Namespace") or (name == "args" and type(item) is dict):
            chosen.arguments["args"] = plain(item)
        elif type(item) is Holder or _holds_tensors(item):
            chosen.left_out[name] = "not part of the network's weights"
        else:
            chosen.arguments.setdefault("entries", {})[name] = plain(item)


def _word(key: Any) -> str:
    if type(key) is int and key.bit_length() > 64:  # Python refuses to write very long ones
        return "a very large number"
    return str(key)[:_LONGEST_NAME]


def _holds_tensors(value: Any) -> bool:
    return type(value) is StoredTensor or (type(value) is dict and any(type(item) is StoredTensor for item in value.values()))


def _without_prefixes(chosen: Chosen, path: str) -> dict[str, StoredTensor]:
    tensors = dict(chosen.tensors)
    if "n_averaged" in tensors and len(tensors) > 1:  # torch.optim.swa_utils.AveragedModel counts
        del tensors["n_averaged"]
        chosen.left_out["n_averaged"] = "a counter of the averaging"
    while any(all(key.startswith(prefix) for key in tensors) for prefix in _PREFIXES):
        tensors = {key.split(".", 1)[1]: value for key, value in tensors.items()}
    done = {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}
    if len(done) != len(tensors) or "" in done:
        raise ModelError(f"{path} has two tensors of one name once the prefixes of wrappers are stripped")
    return done


def _refuse_training_state(value: dict, averaged: list[str], path: str) -> None:
    optimizer = any(type(key) is str and key.startswith("optim") for key in value)
    if "net" in value and optimizer and not averaged:
        raise ModelError(f"{path} is a whole training state, without the averaged network: use the network-snapshot .pkl")
    for key in AVERAGED:
        if type(value.get(key)) is dict and {"shadow_params", "emas"} & value[key].keys():
            raise ModelError(f"{path} is a whole training state, and keeps its average without names: use the saved network")


def _no_weights(value: dict) -> str:
    if any(isinstance(item, np.ndarray) for item in value.values()):
        return "holds NumPy arrays and no network: if these are statistics of images, they are for 'mmgen fid'"
    names = ", ".join(ascii(_word(key)[:40])[1:-1] for key in list(value)[:5])
    return f"holds no weights by name; its entries: {names or 'none'}"


def _in_words(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return "a NumPy array"
    if type(value) is Holder:
        return f"an object of the class {ascii(value.name[:60])[1:-1]}"
    return {list: "a list", tuple: "a tuple", StoredTensor: "one tensor"}.get(type(value), "a single value")
