"""Decode untrusted image bytes, and turn photographs upright; with a bound on pixels before any is decoded.

A photograph is what a viewer shows: its EXIF orientation is applied (as detectron2's `read_image` does), here
and wherever a sample is decoded, so heights, widths, masks and boxes are those of the upright picture. A
label map has no orientation: its pixels are taken as they lie.
"""

import io
import warnings

from PIL import ExifTags, Image, ImageOps

PHOTOGRAPHS = ("JPEG", "PNG")  # the decoders that may see untrusted bytes


class PixelsError(ValueError):
    """Bytes that are no acceptable image. `fault` is the reason of the reject: "corrupt" or "pixels"."""

    def __init__(self, fault: str, detail: str) -> None:
        super().__init__(fault, detail)
        self.fault, self.detail = fault, detail


def decode(data: bytes, formats: tuple[str, ...], max_pixels: int) -> Image.Image:
    """Bytes -> the image, decoded to the last row. Raises `PixelsError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` decides, below
            image = Image.open(io.BytesIO(data), formats=formats)
        if image.width * image.height > max_pixels:
            detail = f"{image.width} x {image.height} is more than {max_pixels} pixels"
            raise PixelsError("pixels", detail)
        image.load()
        if image.format == "PNG":  # `load` stops at the last pixel and skips checksums
            Image.open(io.BytesIO(data), formats=formats).verify()
    except PixelsError:
        raise
    except Image.DecompressionBombError as error:
        raise PixelsError("pixels", f"{type(error).__name__}: {error}") from None
    except Exception as error:  # what a decoder raises on hostile bytes is anything
        # the decoder's message may hold the address of a buffer, which differs from run to run
        detail = f"{type(error).__name__}: {error}".split(" <_io")[0]
        raise PixelsError("corrupt", detail) from None
    if not image.width * image.height:
        raise PixelsError("corrupt", f"{image.width} x {image.height} pixels")
    return image


def upright(image: Image.Image) -> Image.Image:
    """Turn or mirror a photograph as its EXIF orientation says. Raises `PixelsError` where EXIF is broken."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception as error:  # EXIF is as untrusted as the pixels
        raise PixelsError("corrupt", f"EXIF: {type(error).__name__}: {error}") from None
