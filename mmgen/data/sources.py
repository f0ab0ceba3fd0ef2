"""What lies at a path: recognises the layout and opens it as an `ImageSource`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError
from ..system.files import at_home, resolved
from . import tables
from .columns import columns_of
from .decode import image_suffixes
from .files import files_in_folder, files_in_tars, files_in_zip
from .image_source import ImageSource, Reading
from .images import METADATA, open_images
from .splits import canonical, no_split, select_split, split_of
from .subsets import choose, configs_of
from .walk import Listing, by_suffix, walk

__all__ = ["ImageSource", "open_source"]

LAYOUTS = (
    "parquet files, a save_to_disk folder, folders of images (one a class), a flat folder of images, an EDM zip, or "
    "webdataset's tars"
)
_TO_FOLDER = "unpack it into folders of images, one a class, and give the outer folder"
_REFUSED = (  # (ends of file names, what the file is, what to do instead)
    ((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"), "a compressed tar archive", _TO_FOLDER),
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


def open_source(path: Path, **options: Any) -> ImageSource:
    """Opens a file or folder of images; `options` are the fields of `Reading`.

    Raises DataError where the layout is not known (and says what to do instead), the split, subset or a column is not there,
    the labels are incomplete, or a file is damaged. Images themselves are not read here.
    """
    reading, path = Reading(**options), resolved(at_home(path))
    if path.is_file():
        return _open_file(path, reading)
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        _refuse_subset(path, reading)
        return tables.open_saved(path, reading)
    listing = walk(path, reading.follow_links)
    names, chosen = choose(listing.names, reading.split, reading.subset, configs_of(path / "README.md"), str(path))
    listing = listing._replace(names=names)
    images, tars = listing.ending(*image_suffixes()), listing.ending(".tar")
    if tars and "README.md" in names and all("/" not in name for name in images):
        images = []  # pictures of the README
    parquet = [name for name in listing.ending(".parquet") if PurePosixPath(name).name not in METADATA]
    if parquet and (images or tars) and not _holds_images(path / parquet[0]):
        parquet = []  # img2dataset keeps addresses in tables beside its images
    if parquet:
        return tables.open_parquet(path, *_of_split(parquet, reading, chosen, listing), reading)
    arrow = [name for name in listing.ending(".arrow") if not PurePosixPath(name).name.startswith(("cache-", "tmp"))]
    if arrow:
        names, source, notes = _of_split(arrow, reading, chosen, listing)
        return _noted(tables.open_arrow(path, names, source, reading), notes)
    if images:
        return open_images(files_in_folder(listing), reading, chosen)
    if tars:
        names, _, notes = _of_split(tars, reading, chosen, listing)
        return _noted(open_images(files_in_tars(path, names), reading, split_chosen=True), notes)
    raise _refusal(path, listing)


def _of_split(names: list[str], reading: Reading, chosen: bool, listing: Listing) -> tuple[list[str], Path, list[str]]:
    """(the files of the split, the folder, notes)"""
    names = names if chosen else select_split(names, reading.split, str(listing.folder))
    return names, listing.folder, [f"split {canonical(reading.split)}", *listing.notes]


def _noted(source: ImageSource, notes: list[str]) -> ImageSource:
    return replace(source, description=", ".join([source.description, *notes]))


def _holds_images(path: Path) -> bool:
    import pyarrow.parquet as pq

    try:
        return any(column.kind in ("image", "bytes") for column in columns_of(pq.read_schema(path)))
    except Exception:  # damaged, which will be said when it is read
        return True


def _open_file(path: Path, reading: Reading) -> ImageSource:
    name = path.name.lower()
    _refuse_subset(path, reading)
    own = split_of(path.name)
    if name.endswith((".parquet", ".arrow", ".tar")) and canonical(reading.split) not in ("train", own):
        raise no_split(str(path), reading.split, [own or "train"])  # a file named by the user is meant, train or not
    if name.endswith(".parquet"):
        return tables.open_parquet(path.parent, [path.name], path, [], reading)
    if name.endswith(".arrow"):
        return tables.open_arrow(path.parent, [path.name], path, reading)
    if name.endswith(".tar"):
        return open_images(files_in_tars(path.parent, [path.name]), reading, split_chosen=True)
    if name.endswith(".zip"):
        return open_images(files_in_zip(path), reading)
    for ends, what, instead in _REFUSED:
        if name.endswith(ends):
            raise DataError(f"{path} is {what}: {instead}")
    if name.endswith(image_suffixes()):
        raise DataError(f"{path} is a single image: give the folder it lies in")
    raise DataError(f"{path} is no data set that mmgen knows: it reads {LAYOUTS}")


def _refuse_subset(path: Path, reading: Reading) -> None:
    if reading.subset is not None:
        raise DataError(f"--subset {reading.subset}: {path} is one data set, and has no subsets: leave it out")


def _refusal(path: Path, listing: Listing) -> DataError:
    for ends, what, instead in _REFUSED:
        found = listing.ending(*ends)
        if found:
            return DataError(f"{path} holds no images but {what} ({found[0]}): {instead}")
    what = f"holds no images ({by_suffix(listing.names)})" if listing.names else "is empty"
    return DataError("; ".join([f"{path} {what}: mmgen reads {LAYOUTS}", *listing.notes]))
