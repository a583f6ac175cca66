"""Plain JPEGs of a batch decoded on a GPU by nvJPEG, as torchvision brings it. Its pixels are not those of the decoder
that training used, so how far they are off is looked at and said before anybody goes by the answers.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from convscale.artifact.artifact import Artifact
from convscale.errors import UserError, first_line, naming_extras
from convscale.images.decode import Bytes, ImageError, decode_image, parse_header
from convscale.images.preprocess import Preprocessing
from convscale.machine import need_cuda
from convscale.words import plural

_END = b"\xff\xd9"
_ADOBE = b"\xff\xee\x00\x0eAdobe"
_TRANSFORM_AT = 15
"""Where, from its marker, an Adobe segment says how colours are stored; 0: as they are, not as luma and chroma."""


class Encoded(np.ndarray):
    """The bytes, uint8 (N,), of a file that is not decoded yet."""


class NvJpeg:
    """Decodes plain JPEGs on the artefact's GPU, all other pictures on the processor.

    Args:
        artifact: a classifier's, opened on a GPU.
        read: gives a file's bytes.
        say: told once how far pixels differ from the usual decoder's, and how many answers change.

    Raises:
        UserError: a detector's, no GPU, or a torchvision without nvJPEG.
    """

    def __init__(self, artifact: Artifact, read: Callable[[str], Bytes], say: Callable[[str], object]) -> None:
        if artifact.is_detector:
            raise UserError("decode is 'nvjpeg', which is for classifiers, and this is a detector; leave it out")
        if not artifact.device.startswith("cuda"):
            raise UserError(
                f"decode is 'nvjpeg', which works on a GPU, and the artefact is opened on {artifact.device}; give "
                "device 'cuda' (--device cuda), or leave decode out"
            )
        with naming_extras("decode 'nvjpeg'"):
            from torchvision.io import ImageReadMode, decode_jpeg
        need_cuda(artifact.device, "leave decode 'nvjpeg' out")
        self._artifact, self._read, self._say, self._told = artifact, read, say, False
        self._decode, gray = decode_jpeg, artifact.preprocessing.channels == 1
        self._mode = ImageReadMode.GRAY if gray else ImageReadMode.RGB
        try:
            self._on_gpu([_smallest()])
        except RuntimeError as error:
            raise UserError(
                f"decode is 'nvjpeg', which this torchvision can not ({first_line(error)}); leave it out"
            ) from error

    def read(self, path: str, preprocessing: Preprocessing, max_pixels: int) -> np.ndarray:
        """A file's bytes where the GPU may decode it, else uint8 (H, W, C) in the artefact's size.

        Raises:
            ImageError: it can not be used.
        """
        data = self._read(path)
        if is_plain(data, max_pixels):
            return np.frombuffer(data, np.uint8).view(Encoded)
        return preprocessing.resize(
            decode_image(data, name=path, channels=preprocessing.channels, max_pixels=max_pixels)
        )

    def decoded(self, batch: Sequence[tuple[str, object]]) -> list[tuple[str, object]]:
        """A batch of paths and what was read of each, with pixels in the place of bytes, or why there are none."""
        files = {at: each for at, (_, each) in enumerate(batch) if isinstance(each, Encoded)}
        made = list(batch)
        if not files:
            return made
        resize = self._artifact.preprocessing.resize
        try:
            pixels = [resize(each) for each in self._on_gpu(list(files.values()))]
        except RuntimeError as error:  # which of them it is, it does not say
            if not self._told:
                self._say(f"nvJPEG gave the first batch up ({first_line(error)}); the processor decodes it")
            self._told = True
            for at, data in files.items():
                made[at] = (batch[at][0], self._on_processor(batch[at][0], data))
            return made
        for at, one in zip(files, pixels, strict=True):
            made[at] = (batch[at][0], one)
        if not self._told:
            self._told = True
            self._compare(pixels, [self._on_processor(batch[at][0], data) for at, data in files.items()])
        return made

    def _on_gpu(self, files: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 (H, W, C) of each file."""
        import torch

        tensors = [torch.from_numpy(data.view(np.ndarray)) for data in files]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torchvision means to give its decoders up
            found = self._decode(tensors, mode=self._mode, device=self._artifact.device)
        return [one.permute(1, 2, 0).contiguous().cpu().numpy() for one in found]

    def _on_processor(self, path: str, data: np.ndarray) -> np.ndarray | str:
        """A file by the decoder that training used, in the artefact's size, or why it has no pixels."""
        how = self._artifact.preprocessing
        try:
            return how.resize(decode_image(bytearray(data.tobytes()), name=path, channels=how.channels))
        except ImageError as error:
            return str(error).removeprefix(f"{path}: ")

    def _compare(self, gpu: Sequence[np.ndarray], usual: Sequence[np.ndarray | str]) -> None:
        """Say how the pictures of the first batch differ, as the network takes them, and what that changes."""
        pairs = [(mine, other) for mine, other in zip(gpu, usual, strict=True) if isinstance(other, np.ndarray)]
        if not pairs:
            return
        mine, other = (np.stack(side) for side in zip(*pairs, strict=True))
        off = np.abs(mine.astype(np.int16) - other.astype(np.int16))
        changed = int((self._answers(mine) != self._answers(other)).any(axis=1).sum())
        answers = f"{changed} of {plural(len(pairs), 'answer')} {'changes' if changed == 1 else 'change'}"
        self._say(
            f"decoded by nvJPEG: in the first batch pixels differ from the usual decoder's by up to {off.max()} of 255 "
            f"({off.mean():.2f} in the mean), and {answers}"
        )

    def _answers(self, images: np.ndarray) -> np.ndarray:
        """(N, 1) likeliest classes; for several labels (N, classes) which of them count."""
        said, least = self._artifact(images, batch_size=len(images)), self._artifact.thresholds
        return said.argmax(1)[:, None] if least is None else said > np.asarray(least)


def is_plain(data: Bytes, max_pixels: int) -> bool:
    """Whether these bytes are a whole JPEG of gray or of luma and chroma, upright and not too large: everything else is
    the usual decoder's affair, which also says what is wrong with it.
    """
    header = parse_header(data)
    if header is None or header.format != "JPEG" or not 0 < header.width * header.height <= max_pixels:
        return False
    adobe = data.find(_ADOBE)
    as_it_is = 0 <= adobe < len(data) - _TRANSFORM_AT and data[adobe + _TRANSFORM_AT] == 0
    return header.components in (1, 3) and header.orientation == 1 and data[-2:] == _END and not as_it_is


def _smallest() -> np.ndarray:
    """A JPEG of one colour, to see whether anything can be decoded at all."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 120, 150)).save(file, format="JPEG")
    return np.frombuffer(bytearray(file.getvalue()), np.uint8)
