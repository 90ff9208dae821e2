"""The classes of the data sets whose own layouts we read: names in index order, and colours."""

from __future__ import annotations

from job.data.dataset import IGNORE, DatasetInfo

_VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)

_CONTEXT = (
    *("background", "aeroplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat"),
    *("book", "bottle", "building", "bus", "cabinet", "car", "cat", "ceiling", "chair", "cloth"),
    *("computer", "cow", "cup", "curtain", "dog", "door", "fence", "floor", "flower", "food"),
    *("grass", "ground", "horse", "keyboard", "light", "motorbike", "mountain", "mouse"),
    *("person", "plate", "platform", "pottedplant", "road", "rock", "sheep", "shelves"),
    *("sidewalk", "sign", "sky", "snow", "sofa", "table", "track", "train", "tree", "truck"),
    *("tvmonitor", "wall", "water", "window", "wood"),
)

_CITYSCAPES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
"""Name, id in `_labelIds.png`, RGB; in the order of the trainIds 0..18."""
_CITYSCAPES_IDS = 34
"""Ids 0..33; those above no class are void. -1, a license plate, is 255 in 8 bits."""


def voc_palette(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """The colours of PASCAL VOC: bits 0, 1, 2 of a number, then 3, 4, 5, are the upper bits of RGB.

    Source: the VOC development kit, VOClabelcolormap.
    """
    colours = []
    for number in range(num_classes):
        channels = [
            sum((number >> (3 * place + channel) & 1) << (7 - place) for place in range(3))
            for channel in range(3)
        ]
        colours.append((channels[0], channels[1], channels[2]))
    return tuple(colours)


VOC = DatasetInfo(_VOC, IGNORE, voc_palette(len(_VOC)))
"""PASCAL VOC 2012. Source: the VOC development kit."""

CONTEXT = DatasetInfo(_CONTEXT, IGNORE, voc_palette(len(_CONTEXT)))
"""PASCAL-Context, 59 classes and the background. Source: the order of the 59 most frequent ones in
Mottaghi et al. 2014, sorted by name, as MMSegmentation's masks number them."""

CITYSCAPES = DatasetInfo(
    tuple(name for name, _, _ in _CITYSCAPES), IGNORE, tuple(rgb for _, _, rgb in _CITYSCAPES)
)
"""Cityscapes by trainId, as in `_labelTrainIds.png`. Source: cityscapesScripts, labels.py."""

_TRAIN_IDS = {label: number for number, (_, label, _) in enumerate(_CITYSCAPES)}
CITYSCAPES_IDS = DatasetInfo(
    CITYSCAPES.classes,
    IGNORE,
    CITYSCAPES.palette,
    tuple((label, _TRAIN_IDS.get(label, IGNORE)) for label in range(_CITYSCAPES_IDS)),
)
"""The same by id, as in `_labelIds.png`."""
