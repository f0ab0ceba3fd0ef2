"""Labels as people write them: read where they are unambiguous, else what was found is said."""

from __future__ import annotations

import pytest
from pictures import COLOURS, colours, folder_of, parquet_of, png, zip_of

from mmgen.data.decode import image_suffixes
from mmgen.data.labels import NotClasses, classes_of
from mmgen.data.sources import open_source
from mmgen.errors import DataError

IMAGES = {"00000/img00000000.png": png(0), "00000/img00000001.png": png(1), "00001/img00000002.png": png(2)}
PAIRS = [[name, label] for name, label in zip(IMAGES, (6, 0, 3))]
KINDS = {"folder": folder_of, "zip": lambda place, files: zip_of(place.with_suffix(".zip"), files)}


@pytest.fixture(params=KINDS)
def place_of(request, tmp_path):
    """Writes files into a folder, and into a zip."""
    return lambda files: KINDS[request.param](tmp_path / "data", files)


# EDM's dataset.json


@pytest.mark.parametrize(
    ("listed", "labels"),
    [
        (lambda name: name.replace("/", "\\"), "dataset.json"),
        (lambda name: f"./{name}", "dataset.json"),
        (lambda name: f"images/train/{name}", "dataset.json"),  # packed from further out
        (lambda name: name.split("/")[1], "dataset.json"),  # without folders
        (lambda name: f"images\\{name}", "dataset.json"),
    ],
)
def test_names_written_in_other_ways(listed, labels, place_of):
    source = open_source(place_of({**IMAGES, labels: {"labels": [[listed(name), label] for name, label in PAIRS]}}))
    assert source.labels.tolist() == [6, 0, 3] and "EDM" in source.description and colours(source) == COLOURS[:3]


@pytest.mark.parametrize("within", [True, False])
def test_a_list_in_a_subfolder(within, place_of):
    """Its names may start there, or outside."""
    inner = {f"set/{name}": content for name, content in IMAGES.items()}
    pairs = [[name if within else f"set/{name}", label] for name, label in PAIRS]
    source = open_source(place_of({**inner, "set/dataset.json": {"labels": pairs}, "LICENSE": "text"}))
    assert source.labels.tolist() == [6, 0, 3] and "1 other file left out (1 LICENSE)" in source.description


def test_a_list_of_the_split(tmp_path):
    train = {f"train/{name}": content for name, content in IMAGES.items()}
    lists = {f"{split}/dataset.json": {"labels": PAIRS} for split in ("train", "test")}
    folder_of(tmp_path, {**train, "test/0.png": png(4), **lists})
    assert open_source(tmp_path).labels.tolist() == [6, 0, 3]


def test_several_lists_are_not_mixed(place_of):
    lists = {f"{part}/dataset.json": {"labels": PAIRS} for part in ("a", "b")}
    place = place_of({"a/0.png": png(0), "b/1.png": png(1), **lists})
    with pytest.raises(DataError, match="several lists of labels .a/dataset.json, b/dataset.json.: give the folder of one"):
        open_source(place)


def test_a_list_that_matches_nothing_is_told(place_of):
    source = open_source(place_of({**IMAGES, "dataset.json": {"labels": [["x/a.png", 1], ["x/b.png", 2]]}}))
    assert source.labels is None
    assert "dataset.json lists 2 names, and 0 of 3 images are among them" in source.description
    assert "the first name without an image is 'x/a.png'" in source.description
    assert "the first image without a name is '00000/img00000000.png'" in source.description


def test_names_without_an_image_are_told(place_of):
    source = open_source(place_of({**IMAGES, "dataset.json": {"labels": [["gone.png", 1], *PAIRS]}}))
    assert source.labels.tolist() == [6, 0, 3]
    assert "lists 4 names, and 3 of 3 images are among them" in source.description and "'gone.png'" in source.description


def test_contradictory_duplicates_are_refused(place_of):
    name = PAIRS[0][0]
    with pytest.raises(DataError, match=f"dataset.json gives .*{name}.* two labels, 6 and 7"):
        open_source(place_of({**IMAGES, "dataset.json": {"labels": [*PAIRS, [name, 7]]}}))
    assert open_source(place_of({**IMAGES, "dataset.json": {"labels": [*PAIRS, PAIRS[0]]}})).labels.tolist() == [6, 0, 3]


def test_another_programs_list_is_passed_over_and_told(tmp_path):
    source = open_source(folder_of(tmp_path, {"a/0.png": png(0), "b/1.png": png(1), "dataset.json": {"name": "mine"}}))
    assert source.class_names == ["a", "b"] and "dataset.json is not EDM's, and left out" in source.description


# Folders


@pytest.mark.parametrize("above", ["", "pets/", "a/b/", "pets/train/", "train/pets/", "train/"])
def test_classes_however_deep(above, place_of):
    files = {f"{above}{name}": png(i) for i, name in enumerate(("cat/0.png", "cat/more/1.png", "dog/2.png"))}
    if "train" in above:
        files[above.replace("train", "val") + "cat/9.png"] = png(5)
    source = open_source(place_of(files))
    assert source.class_names == ["cat", "dog"] and source.labels.tolist() == [0, 0, 1] and colours(source) == COLOURS[:3]
    if "train" in above:
        assert colours(open_source(place_of(files), split="val")) == [COLOURS[5]]
    else:
        with pytest.raises(DataError, match="no split 'val'"):
            open_source(place_of(files), split="val")


def test_numbered_parts_are_no_classes(place_of):
    source = open_source(place_of(IMAGES))
    assert source.labels is None and "folders 00000 to 00001 are parts, not classes" in source.description


def test_images_outside_the_splits_are_told(place_of):
    source = open_source(place_of({"train/a/0.png": png(0), "train/b/1.png": png(1), "logo.png": png(2)}))
    assert source.length == 2 and "1 image outside the folders of splits left out" in source.description


# Suffixes


def test_all_that_is_decoded_is_read(tmp_path):
    """A class of files of a rarer suffix does not vanish, and the later ones are not renumbered."""
    formats = {".jfif": "JPEG", ".jpe": "JPEG", ".jp2": "JPEG2000", ".tga": "TGA", ".ico": "ICO", ".pnm": "PPM", ".avif": "AVIF",
               ".apng": "PNG", ".dib": "BMP", ".PNG": "PNG"}  # fmt: skip
    formats = {suffix: name for suffix, name in formats.items() if suffix.lower() in image_suffixes()}
    assert len(formats) >= 8  # AVIF and JPEG 2000 are not in every Pillow
    files = {f"{i:02d}/x{suffix}": png(i % 6, name, 16) for i, (suffix, name) in enumerate(formats.items())}
    source = open_source(folder_of(tmp_path, files))
    assert source.labels.tolist() == list(range(len(formats)))


def test_what_is_skipped_is_counted_by_suffix(place_of):
    files = {"a/0.png": png(0), "b/1.png": png(1), "b/2.heic": "x", "b/3.HEIC": "x", "b/notes.txt": "x", "b/README": "x"}
    assert "4 other files left out (2 .heic, 1 README, 1 .txt)" in open_source(place_of(files)).description


# Columns


@pytest.mark.parametrize(
    ("values", "labels", "names"),
    [
        (["dog", "cat", "dog", "owl", "cat", "owl"], [1, 0, 1, 2, 0, 2], ["cat", "dog", "owl"]),
        (["10", "9", "9", "10", "3", "3"], [2, 1, 1, 2, 0, 0], ["3", "9", "10"]),
        ([[1], [0], [2], [1], [0], [2]], [1, 0, 2, 1, 0, 2], None),
        ([["dog"], ["cat"]] * 3, [1, 0] * 3, ["cat", "dog"]),
        ([[0, 1, 0], [0, 0, 1], [1, 0, 0]] * 2, [1, 2, 0] * 2, None),
        ([1.0, 0.0] * 3, [1, 0] * 3, None),  # as pandas writes integers among which one was missing
        ([True, False] * 3, [1, 0] * 3, None),
    ],
)
def test_columns_of_other_types(values, labels, names, tmp_path):
    source = open_source(parquet_of(tmp_path / "x.parquet", label=values))
    assert source.labels.tolist() == labels and source.class_names == names and "labels from column label" in source.description


def test_pandas_categories(tmp_path):
    import pyarrow as pa

    column = pa.array(["dog", "cat"] * 3).dictionary_encode()
    assert open_source(parquet_of(tmp_path / "x.parquet", label=column)).class_names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("values", "says"), [([[0, 1], [1], [2], [0], [0], [1, 2]], r"lists of several labels, the first \[0, 1\]"),
                         ([0.5] * 6, "values such as 0.5")],
)  # fmt: skip
def test_columns_that_are_no_classes_are_told(values, says, tmp_path):
    place = parquet_of(tmp_path / "x.parquet", label=values)
    source = open_source(place)
    assert source.labels is None and "column label not taken as classes" in source.description
    with pytest.raises(DataError, match=f"--label-column: column 'label' of .* holds no classes but {says}"):
        open_source(place, label_column="label")


def test_texts_that_are_all_different_are_no_classes():
    texts = [f"a picture of {i}" for i in range(100)]
    with pytest.raises(NotClasses, match="100 different texts, the first 'a picture of 0'"):
        classes_of(texts)
    assert len(classes_of(texts, sure=True)[1]) == 100


COULD_BE = {"species": [0, 1] * 3, "class_name": ["cat", "dog"] * 3, "label": [b"cat", b"dog"] * 3, "cls": [{"id": 0}] * 6}


@pytest.mark.parametrize("kind", ["parquet", "metadata"])
def test_columns_that_could_be_labels_are_named(kind, tmp_path):
    if kind == "parquet":
        place = parquet_of(tmp_path / "x.parquet", **COULD_BE)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        place = folder_of(tmp_path, {f"{i}.png": png(i) for i in range(6)})
        pq.write_table(pa.table({"file_name": [f"{i}.png" for i in range(6)], **COULD_BE}), place / "metadata.parquet")
    source = open_source(place)
    assert source.labels is None and "--label-column could name: species (int64), class_name (string)" in source.description
    assert "column label not taken as classes: its type is binary" in source.description
    assert "column cls not taken as classes: its type is struct<id: int64>" in source.description


@pytest.mark.parametrize("name", ["labels.csv", "train.txt", "list_attr_celeba.txt", "sub/annotations.json"])
def test_lists_that_are_not_read_are_named(name, tmp_path):
    says = f"no labels are read from {name}, but from metadata.jsonl"
    files = {"0.png": png(0), "1.png": png(1), name: "x", "README.txt": "x"}
    assert says in open_source(folder_of(tmp_path / "flat", files)).description
    files = {"a/0.png": png(0), "b/1.png": png(1), name: "x"}
    assert says not in open_source(folder_of(tmp_path / "classes", files)).description


def test_a_folder_without_images_says_what_it_has(tmp_path):
    with pytest.raises(DataError, match=r"holds no images \(2 .heic, 1 .mp4\): mmgen reads"):
        open_source(folder_of(tmp_path, {"a/0.heic": "x", "b/1.HEIC": "x", "b/2.mp4": "x"}))
