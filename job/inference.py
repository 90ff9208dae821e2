"""Using a trained model: scoring it on a data set, and predicting a folder of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from job.config import DataConfig
from job.data.checks import check_data
from job.data.dataset import FOLDER, MARK, Dataset, DatasetInfo, Item
from job.data.images import read_labels, read_rgb, scaled_image
from job.data.names import SCORING, Names
from job.data.scan import scan_dataset
from job.data.splits import SplitItems
from job.errors import DataError
from job.models.files import load_generator
from job.models.generator import Generator
from job.monitor.pictures import Example
from job.scores import Scores
from job.storage.progress import TransferProgress
from job.storage.sync import data_folder
from job.training.boundary import BoundaryScore
from job.training.evaluation import evaluate, predict
from job.training.protocols import PLAIN, Protocol


def choose_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def evaluate_weights(
    weights: str,
    data_uri: str,
    split: str,
    device: torch.device,
    data: DataConfig | None = None,
    progress: TransferProgress | None = None,
    *,
    protocol: Protocol = PLAIN,
    boundary: float | None = None,
    names: Names = SCORING,
) -> Scores:
    """Score a model on all labeled images of a split, at the full resolution of their masks.

    Full resolution, unless the protocol resizes the masks.

    Args:
        weights: path or URI of a model file.
        data_uri: folder or s3:// prefix.
        split: "val" or "train".
        device: where to compute.
        data: says the layout and the validation images, if they are not to be looked for.
        progress: told how far the data are on their way here.
        protocol: how an image is looked at.
        boundary: tolerance of the boundary F-score, of the diagonal; None: there is none.
        names: of the settings, for advice.

    Raises:
        ConfigError: the weights cannot be used.
        DataError: the data cannot be used, have other classes than the model, or the split has no
            labeled image.
    """
    generator, card, _ = load_generator(weights, device)
    with data_folder(data_uri, progress=progress) as folder:
        dataset = scan_dataset(folder, data, needs_train=split == "train", names=names)
        mend = "use the data set the model was trained for"
        refuse_other_classes(dataset, card.classes, "the model's", mend)
        items = labeled_items(dataset, split, mend="check the data and --split")
        check_data(SplitItems(labeled=(), unlabeled=(), val=items, train_sample=()), dataset.info)
        borders = None if boundary is None else BoundaryScore(card.num_classes, boundary)
        found = evaluate(
            generator,
            items,
            dataset.info,
            image_scale=card.image_scale,
            device=device,
            protocol=protocol,
            keep=1,
            look=None if borders is None else lambda _, *pair: borders.update(*pair),
        )
    assert found is not None
    warnings = list(dataset.warnings)
    if protocol.window is not None and not found.windowed:
        size = "x".join(map(str, protocol.window))
        warnings.append(f"the window of {size} is larger than any image: each was seen whole")
    return Scores.of(
        found,
        split=split,
        protocol=protocol,
        classes=card.classes,
        borders=borders,
        warnings=warnings,
    )


def refuse_other_classes(dataset: Dataset, classes: Sequence[str], whose: str, mend: str) -> None:
    """Refuse to score on data of other classes.

    Args:
        dataset: to be scored on.
        classes: that there must be, in their order.
        whose: for the message: "the model's".
        mend: what to do about it.

    Raises:
        DataError: it has others.
    """
    if dataset.info.classes != tuple(classes):
        is_folder = dataset.layout == FOLDER
        raise DataError(
            f"{dataset.root / MARK if is_folder else dataset.root}: its classes "
            f"({', '.join(dataset.info.classes)}) are not {whose} ({', '.join(classes)})",
            mend=mend + ("" if is_folder else f"; {MARK} in it may name its classes otherwise"),
        )


def labeled_items(dataset: Dataset, split: str, *, mend: str) -> tuple[Item, ...]:
    """The images of a split that can be scored on.

    Raises:
        DataError: there are none.
    """
    items = tuple(i for i in (dataset.val if split == "val" else dataset.train) if i.mask)
    if not items:
        raise DataError(
            f"{dataset.root / split}: holds no image with a mask"
            if dataset.layout == FOLDER
            else f"{dataset.root}: of its images of {split} none has a mask",
            mend=mend,
        )
    return items


def examples(
    generator: Generator,
    items: Sequence[Item],
    info: DatasetInfo,
    *,
    image_scale: float,
    device: torch.device,
) -> list[Example]:
    """Predictions of a generator beside the truth, for pictures.

    Draws no random number and leaves the generator in the mode it was in.
    """
    found = []
    training = generator.training
    generator.eval()
    try:
        for item in items:
            assert item.mask is not None
            image = read_rgb(item.image)
            truth = read_labels(item.mask, info)
            scaled = scaled_image(image, image_scale)
            classes = predict(generator, scaled[None], truth.shape, device)[0]
            prediction = classes.to(torch.uint8).cpu().numpy()
            found.append(Example(item.id, np.asarray(image), truth, prediction))
    finally:
        generator.train(training)
    return found
