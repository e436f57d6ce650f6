"""Image files by content: what a reference names is what is read, or nothing is.

Environments, engines' clients and the learner each read the same file at another time; one that was written anew in
between would have the learner train on another picture than the engine saw.
"""

import hashlib
from pathlib import Path

from syncline.errors import ConfigError
from syncline.types import ImageRef


def image_ref(path: str | Path) -> ImageRef:
    """The file as it is now. Raises `ConfigError` when it cannot be read."""
    return ImageRef(str(path), hashlib.sha256(_bytes(str(path))).hexdigest())


def read_image(image: ImageRef) -> bytes:
    """The file's bytes. Raises `ConfigError` when they are no longer those that were referred to."""
    content = _bytes(image.path)
    found = hashlib.sha256(content).hexdigest()
    if found != image.sha256:
        raise ConfigError(
            [
                f"image {image.path}: has sha256 {found[:12]} now and had {image.sha256[:12]} when the task was made; "
                "keep image files as they are while a run uses them"
            ]
        )
    return content


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError([f"image {path}: cannot be read ({error}); give a file every process can open"]) from error
