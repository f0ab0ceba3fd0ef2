"""What lies at a path: recognises the layout and opens it as an `ImageSource`."""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError
from ..system.files import at_home, resolved
from . import folders, tables
from .image_source import ImageSource
from .splits import canonical, no_split, split_of
from .walk import Listing, walk

__all__ = ["ImageSource", "open_source"]

LAYOUTS = "parquet files, a save_to_disk folder, folders of images (one a class), a flat folder of images, or an EDM zip"
_TO_FOLDER = "unpack it into folders of images, one a class, and give the outer folder"
_REFUSED = (  # (ends of file names, what the file is, what to do instead)
    ((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"), "a tar archive", _TO_FOLDER),
    ((".npz", ".npy"), "NumPy arrays", "write them as images, one folder a class, and give the outer folder"),
    (("data.mdb", ".lmdb"), "an LMDB database", "export it to folders of images and give the outer folder"),
    (
        ("data_batch_1", "test_batch", "batches.meta", ".pkl", ".pickle"),
        "Python pickles, which can run any code when opened",
        "use --data cifar10, which takes the parquet files of the hub",
    ),
    (("-ubyte", "-ubyte.gz"), "MNIST's idx files", "use --data ylecun/mnist, which takes the parquet files of the hub"),
    ((".zip",), "a zip archive", "give the path of the zip itself"),
)


def open_source(
    path: Path, *, split: str = "train", image_column: str | None = None, label_column: str | None = None
) -> ImageSource:
    """Opens a file or folder of images.

    Raises DataError where the layout is not known (and says what to do instead), the split or a column is not there,
    the labels are incomplete, or a file is damaged. Images themselves are not read here.
    """
    path = resolved(at_home(path))
    if path.is_file():
        return _open_file(path, split, image_column, label_column)
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return tables.open_saved(path, split, image_column, label_column)
    listing = walk(path)
    parquet = [f for f in listing.ending(".parquet") if Path(f.name).name != "metadata.parquet"]
    if parquet:
        return tables.open_parquet(listing, parquet, split, image_column, label_column)
    arrow = [f for f in listing.ending(".arrow") if not Path(f.name).name.startswith(("cache-", "tmp"))]
    if arrow:
        return tables.open_arrow(listing, arrow, split, image_column, label_column)
    images = listing.ending(*folders.IMAGE_SUFFIXES)
    if not images:
        raise _refusal(path, listing)
    _refuse_columns(path, image_column, label_column)
    if folders.is_edm_folder(listing):
        _refuse_split(path, split)
        return folders.open_edm_folder(listing, images)
    return folders.open_image_folder(listing, images, split)


def _open_file(path: Path, split: str, image_column: str | None, label_column: str | None) -> ImageSource:
    name = path.name.lower()
    if name.endswith((".parquet", ".arrow")):
        if canonical(split) not in ("train", split_of(path.name)):  # a file named by the user is meant, train or not
            raise no_split(str(path), split, [split_of(path.name) or "train"])
        status = path.stat()
        listing = Listing.of_file(path, status.st_size, status.st_mtime_ns)
        opener = tables.open_parquet if name.endswith(".parquet") else tables.open_arrow
        return opener(listing, listing.files, None, image_column, label_column)
    if name.endswith(".zip"):
        _refuse_columns(path, image_column, label_column)
        _refuse_split(path, split)
        return folders.open_edm_zip(path)
    for ends, what, instead in _REFUSED:
        if name.endswith(ends):
            raise DataError(f"{path} is {what}: {instead}")
    if name.endswith(folders.IMAGE_SUFFIXES):
        raise DataError(f"{path} is a single image: give the folder it lies in")
    raise DataError(f"{path} is no data set that mmgen knows: it reads {LAYOUTS}")


def _refusal(path: Path, listing: Listing) -> DataError:
    for ends, what, instead in _REFUSED:
        found = listing.ending(*ends)
        if found:
            return DataError(f"{path} holds no images but {what} ({found[0].name}): {instead}")
    left_out = ""
    if listing.links_left_out:
        left_out = f"; {listing.links_left_out:,} links that lead out of it are not followed: give what they point to"
    what = "holds no images" if listing.files else "is empty"
    return DataError(f"{path} {what}: mmgen reads {LAYOUTS}{left_out}")


def _refuse_columns(path: Path, image_column: str | None, label_column: str | None) -> None:
    for option, column in (("--image-column", image_column), ("--label-column", label_column)):
        if column is not None:
            raise DataError(f"{option} {column}: {path} holds image files, which have no columns: leave it out")


def _refuse_split(path: Path, split: str) -> None:
    if canonical(split) != "train":
        raise no_split(str(path), split, ["train"])
