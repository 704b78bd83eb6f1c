"""What a service answers, as its OpenAPI description has it."""

from typing import Any

from pydantic import BaseModel, Field


class RegionResult(BaseModel):
    """A place above the pixel threshold, in pixels of the image."""

    bbox: list[float] = Field(description="left, top, width, height, as COCO has it")
    area: float
    peak: list[float] = Field(description="row, col")
    score: float
    mean: float


class ImageResult(BaseModel):
    """What the detector says of one image: the fields of `uniad-fast score`'s JSON lines."""

    image: str = Field(description="the file's name, where it has one")
    class_name: str | None = Field(alias="class", description="recognized or told; null where none was sure")
    score: float = Field(description="standard deviations above the median of good images")
    label: int = Field(description="1 above the threshold, else 0")
    threshold: float
    heat_map: str | None = Field(None, description="with map=png: a PNG of the image under its map, in base64")
    regions: list[RegionResult] | None = Field(None, description="with regions=1")
    note: str | None = Field(None, description="what of the image was not seen quite as it is")


class Results(BaseModel):
    """One entry an image, in order."""

    results: list[ImageResult]


class Problem(BaseModel):
    """Why a request was refused: a sentence, or for each wrong parameter what is wrong with it."""

    detail: Any
