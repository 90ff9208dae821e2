"""Which images are predicted, and in what pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import job
from job.errors import ConfigError, DataError
from job.models.files import ModelCard, model_file
from job.models.generator import Architecture, Generator
from job.outlines import CocoOutlines, PolygonOutlines
from job.prediction import Wish, predict_images
from job.storage import open_store
from job.training.protocols import PLAIN
from tests.unit.training.tiny import CPU

CLASSES = ("background", "square", "disc")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(3)
    generator = Generator(Architecture("tiny", 3))
    with torch.no_grad():
        for branch in generator.head.branches:
            branch.weight.mul_(40)
        for _ in range(3):
            generator(torch.rand(4, 3, 64, 64) * 255)
    card = ModelCard(generator.architecture, CLASSES, 255, ((0, 0, 0),) * 3, 1.0)
    path = tmp_path_factory.mktemp("model") / "best_model.pth"
    torch.save(model_file(generator, card, kind="generator", iteration=1), path)
    return str(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two sizes, two folders, and something that is no image."""
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for name, size in {
        "a.png": (40, 48),
        "b.jpg": (40, 48),
        "sub/c.png": (40, 48),
        "sub/d.png": (64, 33),
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(path)
    (folder / "notes.txt").write_text("hello")
    return folder


def test_a_file_is_no_place_for_predictions(weights: str, photos: Path) -> None:
    image = str(photos / "a.png")
    with pytest.raises(ConfigError, match="is a file"):
        predict_images(weights, image, image, CPU)


def predicted(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): np.asarray(Image.open(path)).tobytes()
        for path in sorted(folder.rglob("*.png"))
    }


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["a", "b", "sub/c", "sub/d"]),
        ("/*.png", ["a"]),
        ("/*", ["a", "b"]),
        ("/**/*.png", ["a", "sub/c", "sub/d"]),
        ("/s*/[c]*", ["sub/c"]),
        ("/b.jpg", ["b"]),
        ("/sub/?.png", ["c", "d"]),
    ],
)
def test_a_folder_a_pattern_or_a_file_says_which(
    pattern: str, names: list[str], photos: Path, weights: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = predict_images(weights, f"{photos}{pattern}", str(out), CPU)
    assert outcome.written == len(names)
    found = sorted(p.relative_to(out).with_suffix("").as_posix() for p in out.rglob("*.png"))
    # Names are relative to the folder before the first wildcard.
    found = [name for name in found if not name.endswith("_overlay")]
    assert found == names or found == [Path(name).name for name in names]


def test_batches_change_nothing(photos: Path, weights: str, tmp_path: Path) -> None:
    for batch in (1, 2, 8):
        out = str(tmp_path / str(batch))
        predict_images(weights, str(photos), out, CPU, Wish(batch=batch))
    assert predicted(tmp_path / "1") == predicted(tmp_path / "2") == predicted(tmp_path / "8")
    assert len(set(predicted(tmp_path / "1")["a.png"])) > 1


def test_without_overlays_there_are_class_numbers_only(
    photos: Path, weights: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    predict_images(weights, str(photos), str(out), CPU, Wish(with_overlay=False))
    assert sorted(predicted(out)) == ["a.png", "b.png", "sub/c.png", "sub/d.png"]


def test_an_unreadable_image_is_named_and_the_others_go_on(
    photos: Path, weights: str, tmp_path: Path
) -> None:
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    outcome = predict_images(weights, str(photos), str(tmp_path / "out"), CPU, Wish(batch=3))
    assert outcome.written == 4
    assert len(outcome.unreadable) == 1
    assert "broken.png" in outcome.unreadable[0]


def test_what_mirrors_and_windows_do_reaches_the_pictures(
    photos: Path, weights: str, tmp_path: Path
) -> None:
    plain, other = tmp_path / "plain", tmp_path / "other"
    predict_images(weights, str(photos / "a.png"), str(plain), CPU)
    protocol = PLAIN.changed(window="32", flip=True)
    predict_images(weights, str(photos / "a.png"), str(other), CPU, Wish(protocol=protocol))
    assert predicted(plain) != predicted(other)


@pytest.mark.parametrize(
    ("images", "out", "said"),
    [
        ("nowhere", "out", "no such folder or image"),
        ("photos/x*.png", "out", "no image has such a name"),
        ("photos/x.png", "out", "no such file"),
        ("photos", "photos", "choose another"),
    ],
)
def test_wrong_places_are_named(
    images: str,
    out: str,
    said: str,
    photos: Path,
    weights: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(photos.parent)
    with pytest.raises((ConfigError, DataError)) as caught:
        predict_images(weights, images, out, CPU)
    assert said in str(caught.value)


def test_what_was_predicted_before_is_not_predicted_again(
    photos: Path, weights: str, tmp_path: Path
) -> None:
    out = photos / "predicted"
    first = predict_images(weights, str(photos), str(out), CPU)
    again = predict_images(weights, str(photos), str(out), CPU, Wish(existing="replace"))
    assert again.written == first.written


def test_after_an_interruption_only_the_rest_is_predicted(
    photos: Path, weights: str, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    kinds = (CocoOutlines, PolygonOutlines)
    expected = predict_images(weights, str(photos), str(whole), CPU, outlines=kinds)
    predict_images(weights, str(photos), str(out), CPU)
    (out / "a_overlay.png").unlink()  # as if killed between the two
    (out / "sub" / "d.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    skip = Wish(existing="skip")
    for again in (
        predict_images(weights, str(photos), str(out), CPU, skip, outlines=kinds),
        predict_images(weights, str(photos), str(out), CPU, skip, outlines=kinds),
    ):
        assert again.written + again.skipped == expected.written
        assert [one.to_json() for one in again.outlines] == [
            one.to_json() for one in expected.outlines
        ]
    assert again.skipped == expected.written
    for path in whole.rglob("*.png"):
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()
    kept = [path for path, time in before.items() if path.stat().st_mtime_ns == time]
    assert len(kept) == 2 * (expected.written - 2)

    Image.new("RGB", (9, 9), (1, 2, 3)).save(out / "a.png")
    with pytest.raises(ConfigError, match=r"a\.png is no prediction of this model"):
        predict_images(weights, str(photos), str(out), CPU, skip, outlines=kinds)


def test_images_that_lie_where_predictions_go_are_predicted(photos: Path, weights: str) -> None:
    found = predict_images(weights, f"{photos}/sub/*.png", str(photos / "sub" / "masks"), CPU)
    assert found.written == 2
    found = predict_images(weights, f"{photos}/**/d.png", str(photos / "sub"), CPU)
    assert found.written == 2  # sub/d.png, and sub/masks/d.png, which is of another image
    assert (photos / "sub" / "sub" / "d.png").exists()


@pytest.mark.parametrize(
    ("images", "out"), [("photos/sub/e.jpg", "photos"), ("photos/sub", "elsewhere")]
)
def test_a_picture_that_is_there_already_is_not_replaced(
    images: str, out: str, photos: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    Image.new("RGB", (40, 40)).save(photos / "sub" / "e.jpg")
    theirs = Path(out) / "e.png"
    theirs.parent.mkdir(exist_ok=True)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(theirs)
    before = theirs.read_bytes()
    with pytest.raises(ConfigError, match=r"e\.png would be replaced, of") as caught:
        predict_images(weights, images, out, CPU)
    assert "--overwrite" in caught.value.mend
    assert theirs.read_bytes() == before
    assert [path.name for path in Path(out).glob("*_overlay.png")] == []
    predict_images(weights, images, out, CPU, Wish(existing="replace"))
    assert theirs.read_bytes() != before


@pytest.mark.usefixtures("s3_env")
def test_on_s3_nothing_is_replaced_or_predicted_twice(
    photos: Path, weights: str, bucket: str
) -> None:
    place = f"s3://{bucket}/photos"
    store = open_store(place)
    for path in photos.rglob("*.png"):
        store.write(path.relative_to(photos).as_posix(), path.read_bytes())
    for images in (place, f"{place}/a.png", f"{place}/*.png"):
        with pytest.raises(ConfigError, match="is the folder of the images"):
            predict_images(weights, images, place, CPU, Wish(existing="replace"))
        assert store.read("a.png") == (photos / "a.png").read_bytes()
    masks = f"{place}/masks"
    assert predict_images(weights, place, masks, CPU).written == 3
    with pytest.raises(ConfigError, match="would be replaced"):
        predict_images(weights, place, masks, CPU)
    assert predict_images(weights, place, masks, CPU, Wish(existing="replace")).written == 3


def test_an_overlay_never_takes_the_place_of_another_prediction(
    photos: Path, weights: str, tmp_path: Path
) -> None:
    Image.new("RGB", (40, 40)).save(photos / "a_overlay.png")
    Image.new("RGB", (40, 40)).save(photos / "a.png")
    with pytest.raises(DataError, match="its overlay would have the name"):
        predict_images(weights, str(photos), str(tmp_path / "out"), CPU)
    plain = predict_images(
        weights, str(photos), str(tmp_path / "out"), CPU, Wish(with_overlay=False)
    )
    assert plain.written == len(list((tmp_path / "out").rglob("*.png")))


def test_a_name_with_brackets_is_a_file_if_there_is_one(
    photos: Path, weights: str, tmp_path: Path
) -> None:
    Image.new("RGB", (40, 40)).save(photos / "a[1].png")
    found = predict_images(weights, str(photos / "a[1].png"), str(tmp_path / "out"), CPU)
    assert found.written == 1


def test_a_file_that_does_not_end_as_an_image_is_told_which_do(
    photos: Path, weights: str, tmp_path: Path
) -> None:
    (photos / "t.tif").write_bytes(b"II")
    with pytest.raises(DataError) as caught:
        predict_images(weights, str(photos / "t.tif"), str(tmp_path / "out"), CPU)
    assert ".png" in caught.value.mend


def test_two_images_of_one_name_are_refused(photos: Path, weights: str, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(photos / "a.jpg")
    with pytest.raises(DataError, match="the same name"):
        predict_images(weights, str(photos), str(tmp_path / "out"), CPU)


# ---------------------------------------------------------------------------- tiles


def test_with_a_margin_tiles_are_nearly_what_the_whole_is(
    photos: Path, weights: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3)).astype(np.uint8))
    small.resize((640, 480), Image.Resampling.BICUBIC).save(photos / "large.png")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    image = str(photos / "large.png")
    predict_images(weights, image, str(whole), CPU)
    predict_images(weights, image, str(parts), CPU, Wish(tile=256))
    one, other = (np.asarray(Image.open(folder / "large.png")) for folder in (whole, parts))
    assert one.shape == other.shape == (480, 640)
    assert len(np.unique(one)) > 1
    assert (one == other).mean() > 0.98


def test_in_a_program_large_images_go_in_the_same_tiles(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.training.tiling.TILED_ABOVE", 200_000)
    monkeypatch.setattr("job.training.tiling.TILE", 256)
    rng = np.random.default_rng(1)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3)).astype(np.uint8))
    small.resize((640, 480), Image.Resampling.BICUBIC).save(tmp_path / "large.png")
    predict_images(weights, str(tmp_path / "large.png"), str(tmp_path / "out"), CPU)
    model = job.load_model(weights)
    found = model.predict(tmp_path / "large.png")
    assert np.array_equal(found, np.asarray(Image.open(tmp_path / "out" / "large.png")))
    assert not np.array_equal(found, model.predict(tmp_path / "large.png", tile=640))
    with pytest.raises(ConfigError, match="tile 63: is less than 64"):
        model.predict(tmp_path / "large.png", tile=63)
