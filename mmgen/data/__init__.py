"""Data sets: a name on the command line becomes uint8 images `[N, C, R, R]`, integer labels and captions.

    data = load("cifar10")                            # $MMGEN_DATA_DIR/cifar10, the hub's cache, or a download
    data = load("photos/", resolution=64)             # a folder of images, one subfolder a class
    data = load("user/name", split="test")            # any image data set of the Hugging Face hub

`resolve` finds the place and `sources` recognises its layout; `decode` turns one encoded image into pixels; `cache`
does so once for all of them. `encoding` passes them through a VAE into a folder of latents, which `latents` maps: that
is another kind of data set, which `load` refuses. README.md in this folder lists layouts and options.

Tables go through `datasets`: parquet as a stream, so that no second copy is written, .arrow and save_to_disk mapped, metadata
of image folders as rows. Its other builders are not used, and why:

* the hub: `load_dataset(id)` does not find what the hub's cache holds when offline; the files are fetched and then streamed.
* class folders: it names a class by the innermost folder and follows links out of the data.
* webdataset: samples can only be read in a row, and one that lacks a field is passed over; training that is resumed exactly and
  latents that are encoded by several processes need any sample, so tars have an index of (tar, offset, size).
* EDM's zips and dataset.json, NAME.txt beside NAME.png and COCO's captions: it does not know them.

Importing this package imports neither torch nor datasets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .dataset import Dataset, DataShape

if TYPE_CHECKING:
    import os

__all__ = ["DataShape", "Dataset", "load"]


def load(
    name: str,
    *,
    resolution: int | None = None,  # None: the images' own, which must then be square and the same for all
    channels: int | None = None,  # 1, 3, or None: 1 if the first images are all grey
    on_corrupt: str = "stop",  # or "skip": leave out images that cannot be read, and say so in the description
    with_captions: bool = False,  # read the captions too; an image without one is one that cannot be read
    with_labels: bool = False,  # refuse, before anything is decoded, data without
    cache_dir: str | os.PathLike | None = None,  # None: $MMGEN_CACHE, else ~/.cache/mmgen
    progress: Callable[[int, int], None] | None = None,  # called with (images decoded, images in all)
    **reading: Any,  # split, subset, revision, image_column, label_column, caption_column, captions, follow_links: see `Reading`
) -> Dataset:
    """Finds the data set that `name` means, decodes it once, and returns it.

    `name`: `digits` (1,797 images of 8x8 that come with mmgen), `cifar10`, a file or folder, a name in $MMGEN_DATA_DIR,
    or `user/name` on the Hugging Face hub. Images of another size are resized and centre-cropped as ADM does.
    The digits are small enough to be decoded anew each time; everything else is decoded into the cache, and later calls
    map that file. Raises DataError where there is no such data set, or it cannot be understood, read or cached.
    """
    from dataclasses import replace

    from . import cache
    from .captions import with_captions as captioned
    from .labels import check_there
    from .resolve import DIGITS, locate, resolve

    cache.check_options(resolution, channels, on_corrupt)
    source = resolve(name, **reading)
    if with_labels:
        check_there(source.labels, source.description)
    captions = None
    if with_captions:
        source, captions = captioned(source, on_corrupt)
    options: dict[str, Any] = {"captions": captions, "on_corrupt": on_corrupt, "progress": progress, "name": name}
    if name == DIGITS:
        dataset = cache.decode_in_memory(source, resolution, channels, **options)
    else:
        dataset = cache.prepare(source, resolution, channels, cache_dir=cache_dir, **options)
    return replace(dataset, path=locate(name))
