"""What a model scores on a data set, and how that is written down."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from job.training.boundary import BoundaryScore
from job.training.evaluation import Evaluation
from job.training.protocols import Protocol

_NEVER = "does not occur"


@dataclass(frozen=True)
class Scores:
    """Of all images together, unless it says otherwise; a class that does not occur has None."""

    split: str
    protocol: dict[str, Any]
    """How each image was looked at; see `Protocol`."""
    images: int
    miou: float
    """Over the classes that occur."""
    miou_all: float
    """Over all of them; one that does not occur counts as 0, as in the S4GAN reference."""
    pixel_accuracy: float
    mean_class_accuracy: float
    frequency_weighted_iou: float
    boundary_f: float | None
    """Mean over images, then over classes; None if nobody asked."""
    class_iou: dict[str, float | None]
    class_accuracy: dict[str, float | None]
    class_boundary_f: dict[str, float | None] | None
    confusion: list[list[int]]
    """Pixels: rows truth, columns prediction, in class order."""
    image_miou: dict[str, float]
    """Of each image alone, over the classes in its truth or prediction."""
    warnings: Sequence[str] = ()
    """What is odd about the data, and may make the scores others than they seem."""

    @classmethod
    def of(
        cls,
        found: Evaluation,
        *,
        split: str,
        protocol: Protocol,
        classes: Sequence[str],
        borders: BoundaryScore | None,
        warnings: Sequence[str] = (),
    ) -> Scores:
        """Of an evaluation that has kept the scores of its images."""
        matrix = found.matrix

        def named(values: Sequence[float | None]) -> dict[str, float | None]:
            return dict(zip(classes, values, strict=True))

        return cls(
            split=split,
            protocol=asdict(protocol),
            images=len(found.scores),
            miou=matrix.miou(),
            miou_all=matrix.miou_all(),
            pixel_accuracy=matrix.pixel_accuracy(),
            mean_class_accuracy=matrix.mean_class_accuracy(),
            frequency_weighted_iou=matrix.frequency_weighted_iou(),
            boundary_f=borders.mean() if borders else None,
            class_iou=named(matrix.class_iou()),
            class_accuracy=named(matrix.class_accuracy()),
            class_boundary_f=named(borders.class_scores()) if borders else None,
            confusion=matrix.counts.cpu().tolist(),
            image_miou=found.scores,
            warnings=tuple(warnings),
        )

    def text(self) -> str:
        """For a terminal."""
        width = max(len(name) for name in self.class_iou)
        lines = [f"{self.images} images of {self.split}, protocol {self._protocol}"]
        lines += [f"{name:<22} {value:.4f}" for name, value in self._totals().items()]
        lines.append(f"{'':<{width + 2}}" + "".join(f"  {name:>10}" for name in self._columns()))
        for name, values in self._rows():
            if all(value is None for value in values):
                lines.append(f"  {name:<{width}}  {_NEVER}")
            else:
                cells = [f"{'-' if value is None else f'{value:.4f}':>10}" for value in values]
                lines.append(f"  {name:<{width}}  " + "  ".join(cells))
        return "\n".join(lines)

    def markdown(self) -> str:
        """Two tables."""
        totals = self._totals()
        columns = self._columns()
        return "\n".join(
            [
                f"{self.images} images of {self.split}, protocol {self._protocol}",
                "",
                "| " + " | ".join(totals) + " |",
                "|---" * len(totals) + "|",
                "| " + " | ".join(f"{value:.4f}" for value in totals.values()) + " |",
                "",
                "| class | " + " | ".join(columns) + " |",
                "|---" * (1 + len(columns)) + "|",
                *(
                    f"| {name} | "
                    + " | ".join("-" if value is None else f"{value:.4f}" for value in values)
                    + " |"
                    for name, values in self._rows()
                ),
            ]
        )

    def csv(self) -> str:
        """A line for each class, and some for all; empty where there is no number.

        (pixels) is of all pixels alike: their accuracy, and the frequency weighted IoU.
        """
        columns = self._columns()
        rows: list[list[Any]] = [["class", *columns]]
        rows += [[name, *("" if v is None else v for v in values)] for name, values in self._rows()]
        whole = {
            "IoU": self.miou,
            "accuracy": self.mean_class_accuracy,
            "boundary F": self.boundary_f,
        }
        pixels = {
            "IoU": self.frequency_weighted_iou,
            "accuracy": self.pixel_accuracy,
            "boundary F": "",
        }
        rows.append(["(mean)", *(whole[name] for name in columns)])
        rows.append(["(pixels)", *(pixels[name] for name in columns)])
        return _csv(rows)

    def per_image_csv(self) -> str:
        """A line for each image, the worst first."""
        ordered = sorted(self.image_miou.items(), key=lambda pair: (pair[1], pair[0]))
        return _csv([["image", "mIoU"], *map(list, ordered)])

    @property
    def _protocol(self) -> str:
        used = {
            key: value
            for key, value in self.protocol.items()
            if key != "name" and value not in (None, False, (1.0,))
        }
        more = ", ".join(f"{key} {_plain(value)}" for key, value in used.items())
        return f"{self.protocol['name']} ({more})" if more else str(self.protocol["name"])

    def _totals(self) -> dict[str, float]:
        found = {"mIoU": self.miou}
        if self.miou_all != self.miou:
            found["mIoU, absent as 0"] = self.miou_all
        found |= {
            "pixel accuracy": self.pixel_accuracy,
            "mean class accuracy": self.mean_class_accuracy,
            "frequency weighted IoU": self.frequency_weighted_iou,
        }
        return found if self.boundary_f is None else found | {"boundary F": self.boundary_f}

    def _columns(self) -> list[str]:
        return ["IoU", "accuracy", *(["boundary F"] if self.class_boundary_f else [])]

    def _rows(self) -> list[tuple[str, list[float | None]]]:
        tables = [self.class_iou, self.class_accuracy]
        if self.class_boundary_f:
            tables.append(self.class_boundary_f)
        return [(name, [table[name] for table in tables]) for name in self.class_iou]


def _plain(value: Any) -> str:
    if value is True:
        return "on"
    if isinstance(value, tuple):  # a size, or scales
        return ("x" if all(isinstance(part, int) for part in value) else " and ").join(
            map(str, value)
        )
    return str(value)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
