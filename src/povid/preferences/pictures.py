"""Pictures as they are stored: files or encoded bytes."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from PIL import Image

from povid.fault import Fault


def open_picture(image: Path | bytes) -> Image.Image:
    """An RGB picture from a file or from encoded bytes. Raises Fault naming the file when it cannot be decoded."""
    name = f"image {image}" if isinstance(image, Path) else f"an image of {len(image)} bytes"
    try:
        return Image.open(image if isinstance(image, Path) else BytesIO(image)).convert("RGB")
    except FileNotFoundError:
        raise Fault(f"{name} does not exist; mend the path or data.images") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Fault(f"{name} cannot be decoded ({error}); replace the file or remove its record") from None
