"""Which file is the mask of which image."""

from pathlib import Path

from ..printable import printable
from .folder_names import MASK_STEM, folders
from .image_files import EXTENSIONS
from .samples import DataError


class MaskFinder:
    """The masks of one kind of defect: by the image's path below its kind, its stem with _mask, _gt, _label or nothing.

    A folder of the stem's name stands for the masks in it. A suffix of any image format will do.
    """

    def __init__(self, kind: str, own: list[Path], masks: list[Path]) -> None:
        self._roots = [*own, *(child for root in masks for child in folders(root) if child.name == kind)]
        # Masks may lie side by side where there is one kind of defect.
        self._roots += [root for root in masks if not folders(root)]
        self._known: dict[Path, dict[str, list[Path]]] = {}

    def find(self, image: Path) -> Path | None:
        """The mask of the image with this path below its kind's folder, if there is one.

        Raises:
            DataError: there are several.
        """
        for root in self._roots:
            found = self._in(root / image.parent).get(image.stem.lower(), [])
            exact = [path for path in found if path.stem.lower() != image.stem.lower()] or found
            if len(exact) > 1:
                raise DataError(f"{len(exact)} masks for {printable(image)}: {', '.join(map(printable, exact[:3]))}")
            if exact:
                return exact[0]
        return None

    def _in(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._known:
            stems: dict[str, list[Path]] = {}
            for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                if path.name.startswith("."):
                    continue
                if path.is_dir():
                    stems.setdefault(path.name.lower(), []).append(path)
                elif path.suffix.lower() in EXTENSIONS:
                    stem = path.stem.lower()
                    for name in {stem, MASK_STEM.sub("", stem)}:
                        stems.setdefault(name, []).append(path)
            self._known[folder] = stems
        return self._known[folder]
