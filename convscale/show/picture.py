"""A figure of a report as a PNG: the very figure, drawn by a browser without a window."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageChops

from convscale.errors import UserError, first_line
from convscale.files import atomic_path
from convscale.show.page import Figures, document

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH = 1000
"""Of a picture in the browser's pixels, of which each becomes ``SCALE`` x ``SCALE``."""
SCALE = 1.5
_TIMEOUT_S = 120
_OFF = ("gpu", "quic", "sync", "extensions", "background-networking", "component-update")


def browser() -> str:
    """A browser that draws without a window.

    Raises:
        UserError: none is installed.
    """
    for name in BROWSERS:
        if place := shutil.which(name):
            return place
    raise UserError(
        "a .png is drawn by a browser, and none is installed (Debian: apt-get install chromium); an .html file needs "
        "none"
    )


def save_png(figure: Figure, path: str | Path, *, title: str = "", caption: str = "") -> Path:
    """Draw a plotly figure as a PNG, in the colours and with the code of the reports.

    Args:
        title: plain text above it.
        caption: plain text under it.

    Raises:
        UserError: no browser is installed, or it does not draw.
    """
    figures = Figures()
    body = figures.add(figure, caption, label=title or "figure")
    height = int(figure.layout.height or 400) + (60 if title else 0) + (60 if caption else 0) + 50
    with tempfile.TemporaryDirectory() as folder:
        page, drawn = Path(folder) / "figure.html", Path(folder) / "figure.png"
        page.write_text(
            document(title=title, body=body, figures=figures, bare=True), encoding="utf-8", errors="backslashreplace"
        )
        command = [
            browser(),
            "--headless",
            "--no-sandbox",
            "--no-first-run",
            "--hide-scrollbars",
            "--virtual-time-budget=10000",
            *(f"--disable-{name}" for name in _OFF),
            f"--user-data-dir={folder}/profile",
            f"--window-size={WIDTH},{height}",
            f"--force-device-scale-factor={SCALE}",
            f"--screenshot={drawn}",
            page.as_uri(),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"the browser {command[0]} did not draw the picture: {first_line(error)}") from error
        if done.returncode or not drawn.is_file():
            why = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise UserError(f"the browser {command[0]} did not draw the picture: {why[0]}")
        with atomic_path(path) as temporary:
            _cropped_below(drawn).save(temporary, format="PNG")
    return Path(path)


def _cropped_below(drawn: Path) -> Image.Image:
    """The picture without the empty rows at its end: a browser's window is not as high as asked in every version."""
    with Image.open(drawn) as image:
        picture = image.convert("RGB")
    empty = Image.new("RGB", picture.size, picture.getpixel((0, picture.height - 1)))
    box = ImageChops.difference(picture, empty).getbbox()
    bottom = picture.height if box is None else min(picture.height, box[3] + round(16 * SCALE))
    return picture.crop((0, 0, picture.width, bottom))
