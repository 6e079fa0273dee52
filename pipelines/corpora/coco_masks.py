"""The `segmentation` of a COCO annotation: polygons or run lengths, from a file that may say anything."""

from typing import Annotated

from pydantic import Field

from pipelines.corpora.coco_images import CocoImage
from pipelines.corpora.files import Entry, Text
from pipelines.corpora.rows import Refusal
from pipelines.inspection import Facts
from schemas.masks import annotation_rle, area_of
from schemas.records import Rle

MAX_PIXELS = 2**28  # of an image that masks are made for; chosen by us, above any photograph
MAX_INSTANCES = 65535  # of one image: a label map has 16 bits

Coordinate = Annotated[float, Field(allow_inf_nan=False)]
Run = Annotated[int, Field(ge=0, lt=2**31)]


class Runs(Entry):
    """Run lengths, as a list or as COCO's text."""

    size: tuple[int, int]
    counts: Text | list[Run]


Segmentation = list[list[Coordinate]] | Runs


def mask(segmentation: Segmentation | Rle, image: CocoImage | Facts) -> Rle:
    """The pixels of an object. Raises `Refusal`: malformed, far outside the image, of another size, empty."""
    if image.height * image.width > MAX_PIXELS:
        raise Refusal("segmentation", f"the image claims {image.height} x {image.width} pixels")
    outlines = segmentation if isinstance(segmentation, list) else []
    far = 4 * max(image.height, image.width)  # pycocotools allocates by the length of an outline
    if any(abs(number) > far for outline in outlines for number in outline):
        raise Refusal("segmentation", "a polygon lies far outside the image")
    try:
        plain = segmentation if isinstance(segmentation, list) else segmentation.model_dump()
        rle = annotation_rle(plain, image.height, image.width)
    except ValueError as error:
        raise Refusal("segmentation", str(error)) from None
    if not area_of(rle):
        raise Refusal("segmentation", "the mask is empty")
    return rle
