"""Uploads a model to the hub, for `mmgen sample hf://user/name`: the weights, a model card and pictures of the run."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, MmgenError, ModelError
from .model_card import model_card
from ..models.files import MODEL_FILE, find_model, read_config

PICTURES = ("samples.png", "curves.png")
CARD = "README.md"
CONVERTED = "converted"  # entry of ModelConfig.training where `mmgen convert` records a model's source
_REPOSITORY = re.compile(r"(?!.*(\.\.|--))[\w][\w.-]*/[\w][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Pushed:
    url: str
    files: tuple[str, ...]  # names in the repository
    kept_card: bool = False  # the repository's own card was kept, because the run has none


def push(path: str | os.PathLike, repository: str, *, private: bool = False, message: str | None = None) -> Pushed:
    """Uploads a run folder's model, or a model file, as one commit. Creates the repository user/name if it does not exist.

    `private` creates a private repository and refuses an existing public one. The card is the README.md beside the model, else
    the repository's, which somebody may have edited, else a new one. Other files of the folder are not uploaded.

    Raises ConfigError for an invalid name or a missing token, ModelError if `path` is not a model of mmgen, and MmgenError if
    the hub cannot be reached or refuses.
    """
    repository = repository.removeprefix("hf://")
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"{repository!r} is not the name of a hub repository: use user/name")
    if not Path(path).exists():
        raise ModelError(f"there is no run folder or model file {path}")
    file = find_model(path)
    config = read_config(file)

    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise MmgenError("HF_HUB_OFFLINE is set: unset it to upload")
    token = get_token()
    if not token:
        raise ConfigError("pushing to the hub needs a token: run `hf auth login`, or set HF_TOKEN")
    contents: dict[str, Path | bytes] = {MODEL_FILE: file}
    contents |= {name: file.parent / name for name in PICTURES if (file.parent / name).is_file()}
    api = HfApi(token=token)
    try:
        url = str(api.create_repo(repository, private=private or None, exist_ok=True))
        if private and not api.model_info(repository).private:
            raise ConfigError(f"{repository} exists already and is public: leave out --private or choose another name")
        kept_card = False
        if (file.parent / CARD).is_file():
            contents[CARD] = file.parent / CARD
        elif api.file_exists(repository, CARD):
            kept_card = True
        else:
            provenance = {**config.training.get(CONVERTED, {}), "repository": repository}
            contents[CARD] = model_card(config, provenance).encode()
        operations = [CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                      for name, content in contents.items()]  # fmt: skip
        api.create_commit(repository, operations, commit_message=message or f"{file.name} by mmgen push")
    except MmgenError:
        raise
    except Exception as error:  # huggingface_hub's own, and those of requests or httpx, by version
        raise MmgenError(f"cannot push to {repository}: {_reason(error)}") from error
    return Pushed(url, tuple(contents), kept_card)


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub does not accept the token: run `hf auth login` again"
    if status == 403:
        return "the token has no write access there: create one that has, and check the name before the slash"
    detail = (str(error).strip() or type(error).__name__).split("\n")[0]
    if status is not None:
        return f"the hub refuses ({detail})"
    return f"the hub cannot be reached ({detail}): try again later"
