"""How whole images are looked at, against slow computations written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from job.data.images import PADDING_RGB
from job.errors import ConfigError
from job.models.generator import Architecture, Generator
from job.training.evaluation import predict
from job.training.protocols import (
    PLAIN,
    PROTOCOLS,
    Protocol,
    _starts,
    logits_of,
    probabilities,
    protocol_named,
)
from tests.unit.training.tiny import CPU

K = 3


@pytest.fixture(scope="module")
def generator() -> Generator:
    """With opinions that change from place to place."""
    torch.manual_seed(0)
    network = Generator(Architecture("tiny", K))
    with torch.no_grad():
        for branch in network.head.branches:
            branch.weight.mul_(60)
        for _ in range(3):
            network(torch.rand(4, 3, 64, 64) * 255)
    return network.eval()


class Pointwise(nn.Module):
    """Logits of a pixel depend on it alone, so that windows must not change them."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float()[:, :K] / 50


def image(height: int = 70, width: int = 90, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (3, height, width)).astype(np.uint8))


# ---------------------------------------------------------------------------- one look


def test_plain_probabilities_are_the_softmax(generator: Generator) -> None:
    given = image()
    with torch.no_grad():
        found = probabilities(generator, given, (70, 90), PLAIN)
        wanted = generator(given[None]).softmax(dim=1)[0]
    torch.testing.assert_close(found, wanted)


def test_plain_prediction_is_the_same_with_and_without_a_protocol(generator: Generator) -> None:
    array = image().permute(1, 2, 0)[None].numpy()
    assert torch.equal(
        predict(generator, array, (140, 180), CPU),
        predict(generator, array, (140, 180), CPU, Protocol("other")),
    )


def test_padding_is_added_and_cut_off_again(generator: Generator) -> None:
    given = image(40, 50)
    canvas = torch.tensor(PADDING_RGB, dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, 64, 96)
    canvas[..., :40, :50] = given
    with torch.no_grad():
        wanted = generator(canvas)[..., :40, :50]
        found = logits_of(generator, given[None], Protocol(pad_to=(64, 96)))
        plain = logits_of(generator, given[None], PLAIN)
    assert torch.equal(found, wanted)
    assert found.shape == (1, K, 40, 50)
    assert not torch.allclose(found, plain)


def test_an_image_that_is_large_enough_is_not_padded(generator: Generator) -> None:
    given = image(64, 96)[None]
    with torch.no_grad():
        padded = logits_of(generator, given, Protocol(pad_to=(64, 64)))
        assert torch.equal(padded, generator(given))


def test_windows_see_the_padding_of_the_protocol(generator: Generator) -> None:
    given = image(40, 50)
    canvas = torch.tensor(PADDING_RGB, dtype=torch.uint8).view(3, 1, 1).repeat(1, 64, 96)
    canvas[..., :40, :50] = given
    windows = Protocol(window=(32, 32), stride=(16, 16))
    with torch.no_grad():
        found = probabilities(generator, given, (40, 50), replace(windows, pad_to=(64, 96)))
        wanted = probabilities(generator, canvas, (64, 96), windows)[..., :40, :50]
        plain = probabilities(generator, given, (40, 50), windows)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, plain)


# ---------------------------------------------------------------------------- several looks


def test_mirrored_images_are_averaged(generator: Generator) -> None:
    given = image()
    with torch.no_grad():
        one = generator(given[None]).softmax(dim=1)[0]
        other = generator(given.flip(-1)[None]).softmax(dim=1)[0].flip(-1)
        found = probabilities(generator, given, (70, 90), Protocol(flip=True))
    torch.testing.assert_close(found, (one + other) / 2)


def test_scales_are_averaged_at_the_size_asked_for(generator: Generator) -> None:
    given = image()
    wanted = torch.zeros(K, 140, 180)
    for height, width in ((35, 45), (70, 90), (105, 135)):
        view = F.interpolate(given[None].float(), (height, width), mode="bilinear", antialias=True)
        with torch.no_grad():
            logits = generator(view if height != 70 else given[None])
        large = F.interpolate(logits, (140, 180), mode="bilinear", align_corners=True)
        wanted += large.softmax(dim=1)[0] / 3
    with torch.no_grad():
        found = probabilities(generator, given, (140, 180), Protocol(scales=(0.5, 1.0, 1.5)))
    torch.testing.assert_close(found, wanted)


def test_a_window_that_holds_the_image_changes_nothing(generator: Generator) -> None:
    given = image()
    with torch.no_grad():
        whole = probabilities(generator, given, (70, 90), PLAIN)
        windowed = probabilities(generator, given, (70, 90), Protocol(window=(70, 90)))
        larger = probabilities(generator, given, (70, 90), Protocol(window=(801, 801)))
    assert torch.equal(whole, windowed)
    assert torch.equal(whole, larger)


def test_overlapping_windows_are_averaged(generator: Generator) -> None:
    given = image(64, 100)
    protocol = Protocol(window=(64, 64), stride=(40, 40))
    assert _starts(100, 64, 40) == [0, 36]
    total, counts = torch.zeros(K, 64, 100), torch.zeros(64, 100)
    for left in (0, 36):
        with torch.no_grad():
            maps = generator(given[None, :, :, left : left + 64]).softmax(dim=1)[0]
        total[:, :, left : left + 64] += maps
        counts[:, left : left + 64] += 1
    with torch.no_grad():
        found = probabilities(generator, given, (64, 100), protocol)
    torch.testing.assert_close(found, total / counts)


@pytest.mark.parametrize("window", [(32, 32), (20, 90), (70, 17), (100, 40)])
@pytest.mark.parametrize("stride", [None, (7, 13)])
def test_where_pixels_stand_alone_windows_change_nothing(
    window: tuple[int, int], stride: tuple[int, int] | None
) -> None:
    given = image()
    plain = probabilities(Pointwise(), given, (70, 90), PLAIN)
    protocol = Protocol(window=window, stride=stride, flip=True)
    torch.testing.assert_close(probabilities(Pointwise(), given, (70, 90), protocol), plain)


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [
        (100, 64, 36, [0, 36]),
        (100, 64, 40, [0, 36]),
        (100, 50, 50, [0, 50]),
        (101, 50, 50, [0, 50, 51]),
        (64, 64, 40, [0]),
    ],
)
def test_windows_cover_all_of_it(length: int, window: int, stride: int, starts: list[int]) -> None:
    assert _starts(length, window, stride) == starts


# ---------------------------------------------------------------------------- by name


def test_the_references_protocols() -> None:
    assert PROTOCOLS["voc"].pad_to == (505, 505)
    assert PROTOCOLS["cityscapes"].resize_to == (512, 1024)
    assert PROTOCOLS["context"].short_side == 512
    assert PROTOCOLS["context"].centre_crop == (512, 512)
    assert protocol_named("plain") is PLAIN
    with pytest.raises(ConfigError, match="no such protocol") as caught:
        protocol_named("vok")
    assert "voc" in caught.value.mend


def test_context_scores_the_middle_of_the_image_at_512() -> None:
    fitted = PROTOCOLS["context"].fitted(Image.new("RGB", (500, 375)))
    assert fitted.size == (512, 512)
    column = np.zeros((100, 300), np.uint8)
    column[:, 140:160] = 1
    labels = np.asarray(
        Protocol(short_side=50, centre_crop=(50, 50)).fitted(Image.fromarray(column), labels=True)
    )
    assert labels.shape == (50, 50)
    assert set(np.unique(labels)) == {0, 1}
    assert labels[0].tolist() == [0] * 20 + [1] * 10 + [0] * 20


def test_labels_are_resized_without_mixing() -> None:
    labels = Image.fromarray(np.random.default_rng(0).choice([0, 7, 255], (64, 128)).astype("u1"))
    fitted = PROTOCOLS["cityscapes"].fitted(labels, labels=True)
    assert fitted.size == (1024, 512)
    assert set(np.unique(np.asarray(fitted))) == {0, 7, 255}


def test_the_command_line_adds_to_a_protocol() -> None:
    found = PROTOCOLS["voc"].changed(window="300x400", stride="100", flip=True, scales="0.5,1")
    assert found == Protocol(
        "voc",
        pad_to=(505, 505),
        window=(300, 400),
        stride=(100, 100),
        flip=True,
        scales=(0.5, 1.0),
    )
    assert PLAIN.changed() == PLAIN


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"window": "wide"}, "--window wide: must be HEIGHTxWIDTH"),
        ({"window": "0x5"}, "must be HEIGHTxWIDTH"),
        ({"stride": "5"}, "there is no window"),
        ({"window": "50x60", "stride": "50x61"}, "larger than the window"),
        ({"scales": "1,big"}, "must be numbers of 0.05 to 8"),
        ({"scales": "0"}, "must be numbers of 0.05 to 8"),
        ({"scales": ""}, "must be numbers"),
    ],
)
def test_wrong_options_are_named(given: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        PLAIN.changed(**given)  # type: ignore[arg-type]
    assert caught.value.mend
