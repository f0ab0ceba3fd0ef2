"""What a `--data` becomes: uint8 images, integer labels, and where they came from (of latents: see `latents`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ..models.latents import LatentSettings
    from .encoded_captions import CaptionsOnTheFly, EncodedCaptions


@dataclass(frozen=True)
class DataShape:
    """What a network must know of its data."""

    resolution: int  # of the latents where there are `latents`
    channels: int
    num_classes: int = 0  # 0: no labels
    class_names: list[str] | None = None
    class_counts: list[int] | None = None  # images of each class
    latents: LatentSettings | None = None  # of a data set of latents
    captions: list[str] | None = None  # of captioned data, the first one each of at most MOST_CAPTIONS images, evenly spaced


class Labelled:
    """What images and latents have in common: everything that follows from labels, names and shape."""

    @property
    def num_classes(self) -> int:
        """0 without labels; else the larger of the highest label + 1 and the number of class names."""
        if self.labels is None:
            return 0
        return max(int(self.labels.max()) + 1, len(self.class_names or []))

    @property
    def class_counts(self) -> list[int] | None:
        """Images of each class, [num_classes]."""
        if self.labels is None:
            return None
        import numpy as np

        return np.bincount(self.labels, minlength=self.num_classes).tolist()

    @property
    def identity(self) -> dict[str, Any]:
        """What a run, a model and a record call these data by, wherever they are looked at again; as JSON has it."""
        return {"place": self.path, "fingerprint": self.fingerprint}

    @property
    def shape(self) -> DataShape:
        latents = getattr(self, "latents", None)
        names = self.class_names, self.class_counts
        return DataShape(self.resolution, self.channels, self.num_classes, *names, latents, self._some_captions())

    def _some_captions(self) -> list[str] | None:
        captions = getattr(self, "captions", None)
        if captions is None:
            return None
        import numpy as np

        from ..models.config import MOST_CAPTIONS

        chosen = np.unique(np.linspace(0, len(captions) - 1, min(MOST_CAPTIONS, len(captions))).round().astype(int))
        return [captions[int(i)][0].as_py() for i in chosen]


@dataclass(frozen=True)
class Dataset(Labelled):
    name: str  # what the user wrote
    images: np.ndarray  # uint8 [N, C, R, R], 0..255; read-only, memory-mapped where it comes from the cache
    labels: np.ndarray | None  # int64 [N], 0 <= label < num_classes
    class_names: list[str] | None
    description: str  # one line: layout, number of images, columns, classes, resolution, what was left out
    fingerprint: str  # SHA-256 of shape, pixels, labels and captions: the same data has the same one wherever it lies
    captions: pa.ListArray | None = None  # list<string> [N], at least one text each, where they were asked for
    path: str = ""  # what the name meant: see `resolve.locate`
    texts: EncodedCaptions | CaptionsOnTheFly | None = None  # the captions as a model is conditioned on them

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def resolution(self) -> int:
        return self.images.shape[-1]

    @property
    def channels(self) -> int:
        return self.images.shape[1]
