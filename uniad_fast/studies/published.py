"""What is published about UniAD, class by class: AUROC in percent.

The paper's own tables stand here as another paper quotes them; their means are those of UniAD's abstract (96.5 and
96.8). What the authors have not published is named as the rerun by others that it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Figures of one data set.

    Attributes:
        source: where they stand.
        figures: {"unified image", "unified pixel", "separate image" or "separate pixel": {class: percent}}.
    """

    source: str
    figures: Mapping[str, Mapping[str, float]]

    def figure(self, class_name: str, column: str) -> float | None:
        """Of a class, whichever way its name is written; None if nothing is published."""
        return self.figures.get(column, {}).get(_plain(class_name))

    def __contains__(self, class_name: str) -> bool:
        return any(_plain(class_name) in column for column in self.figures.values())


def published(classes: Sequence[str]) -> Published | None:
    """The figures for a data set of these classes, or of some of its classes; None if there are none."""
    return next((known for known in _ALL if classes and all(name in known for name in classes)), None)


def _plain(name: str) -> str:
    return name.lower().replace(" ", "_").replace("-", "_")


def _columns(table: str, *columns: str) -> dict[str, dict[str, float]]:
    lines = [line.split() for line in table.strip().splitlines()]
    return {column: {line[0]: float(line[1 + i]) for line in lines} for i, column in enumerate(columns)}


MVTEC_AD = Published(
    "unified: UniAD's as MambaAD (arXiv 2404.06564) quotes it in tables A1 and A2, whose means are those of UniAD's "
    "abstract; separate: the authors' could not be had, and this is MambaAD's own rerun, tables A13 and A14",
    _columns(
        """
        bottle      99.7 98.1 100.0 98.3
        cable       95.2 97.3  97.9 97.4
        capsule     86.9 98.5  87.1 98.0
        carpet      99.8 98.5  99.4 98.5
        grid        98.2 96.5  97.6 94.3
        hazelnut    99.8 98.1  99.7 98.3
        leather    100.0 98.8 100.0 99.1
        metal_nut   99.2 94.8  98.7 94.4
        pill        93.7 95.0  96.0 95.2
        screw       87.5 98.3  87.7 98.4
        tile        99.3 91.8  95.8 90.2
        toothbrush  94.2 98.4  88.1 98.5
        transistor  99.8 97.9 100.0 98.8
        wood        98.6 93.2  97.9 93.5
        zipper      95.8 96.8  90.6 96.5
        """,
        "unified image",
        "unified pixel",
        "separate image",
        "separate pixel",
    ),
)
VISA = Published(
    "unified: a rerun by ADer (github.com/zhangzjn/ADer, its log of 300 epochs at 256 pixels), separate: a rerun by "
    "MambaAD (arXiv 2404.06564, tables A15 and A16); UniAD's authors have none of this set",
    _columns(
        """
        candle      97.29 99.28 96.5 98.9
        capsules    73.52 98.37 79.1 98.4
        cashew      90.38 97.90 91.9 99.2
        chewinggum  99.06 99.30 97.4 98.7
        fryum       91.04 97.30 85.5 97.1
        macaroni1   88.09 99.39 87.5 99.0
        macaroni2   81.35 98.28 83.1 98.2
        pcb1        96.33 99.37 91.9 99.2
        pcb2        93.50 98.34 92.2 97.1
        pcb3        89.78 98.53 90.9 98.2
        pcb4        99.39 97.61 98.8 97.5
        pipe_fryum  96.96 98.87 91.9 99.3
        """,
        "unified image",
        "unified pixel",
        "separate image",
        "separate pixel",
    ),
)
CIFAR_10 = Published(
    "github.com/zhiyuanyou/UniAD, README (8 GPUs)",
    {"unified image": {"01234": 84.4, "56789": 79.6, "02468": 93.0, "13579": 89.1}},
)
_ALL = (MVTEC_AD, VISA, CIFAR_10)
