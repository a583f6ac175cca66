"""What an artefact says of pictures as people have them."""

import io

import numpy as np
import pytest
from PIL import Image

import convscale as cs
from convscale.images.decode import read_image


@pytest.fixture
def files(tmp_path):
    """A JPEG that lies on its side, a transparent PNG, a gray one and one with a palette, 40 x 30 px."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95, exif=exif)
    alpha = random.integers(0, 256, (30, 40, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([pixels, alpha], 2)).save(tmp_path / "b.png")
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "c.png")
    Image.fromarray(pixels).quantize(16).save(tmp_path / "d.png")
    return [tmp_path / name for name in ("a.jpg", "b.png", "c.png", "d.png")]


def expected(art, path):
    """By the steps that training takes: decode, resize, the network."""
    pixels = art.preprocessing.resize(read_image(path, channels=art.preprocessing.channels))
    return art(pixels[None])[0]


def test_files_bytes_and_images_of_pil_have_the_same_answers(onnx_art, files):
    named = onnx_art.classify([str(path) for path in files], top=None)
    for path, answer in zip(files, named, strict=True):
        row = expected(onnx_art, path)
        order = np.argsort(-row, kind="stable")
        assert answer == cs.Answer(
            labels=tuple(onnx_art.classes[i] for i in order),
            probabilities=pytest.approx(tuple(row[order].tolist()), abs=1e-6),
            name=str(path),
        )
    read = onnx_art.classify([path.read_bytes() for path in files], top=None)
    opened = onnx_art.classify([Image.open(path) for path in files], top=None)
    for answers in (read, opened):
        for one, other in zip(answers, named, strict=True):
            assert one.labels == other.labels
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)
            assert (one.name, one.error) == ("", "")


def test_a_folder_an_array_and_a_single_picture(onnx_art, files):
    folder = onnx_art.classify(files[0].parent, top=1)
    assert [answer.name for answer in folder] == [str(path) for path in files]
    (single,) = onnx_art.classify(files[2], top=1)
    assert single == folder[2]
    pixels = np.array(Image.open(files[2]).convert("RGB"))
    (array,) = onnx_art.classify(pixels, top=1)
    assert array.labels == single.labels
    assert [a.labels for a in onnx_art.classify(np.stack([pixels, pixels]), top=1)] == [single.labels] * 2
    assert len(onnx_art.classify(files[2])[0].labels) == min(5, len(onnx_art.classes))


def test_a_bad_picture_is_an_answer_with_its_error(onnx_art, files):
    files[1].write_bytes(files[1].read_bytes()[:60])
    answers = onnx_art.classify([*files, b"no picture", files[0].parent / "none.png"], top=1)
    assert [bool(answer.error) for answer in answers] == [False, True, False, False, True, True]
    assert answers[1].labels == ()
    assert answers[1].error.startswith("PNG image is")
    assert "can not be read" in answers[5].error
    assert answers[0] == onnx_art.classify(files[0], top=1)[0]


def test_what_is_no_picture_is_told(onnx_art, tmp_path):
    with pytest.raises(ValueError, match="a picture is int; it must be a path, bytes"):
        onnx_art.classify(5)
    with pytest.raises(ValueError, match=r"an array of float32 \(4, 4, 3\); it must be uint8"):
        onnx_art.classify(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="holds no image"):
        onnx_art.classify(tmp_path)
    with pytest.raises(ValueError, match="top is 0; it must be a whole number of at least 1"):
        onnx_art.classify(b"", top=0)


def test_several_labels_are_those_above_their_thresholds(onnx_art, files):
    from convscale.artifact.answers import Said

    said = Said(classes=("a", "b", "c"), thresholds=(0.5, 0.2, 0.9), top=5)
    answer = said.answer(np.array([0.4, 0.3, 0.95], np.float32), "x.jpg")
    assert answer.labels == ("c", "b")
    assert answer.probabilities == pytest.approx((0.95, 0.3))


def test_a_cmyk_image_is_read_as_colour(onnx_art):
    image = Image.new("CMYK", (20, 20), (0, 255, 255, 0))
    file = io.BytesIO()
    image.convert("RGB").save(file, format="PNG")
    assert onnx_art.classify(image, top=1)[0].labels == onnx_art.classify(file.getvalue(), top=1)[0].labels


def test_eight_threads_have_the_answers_of_one(onnx_art, files):
    """In a process that has decoded nothing yet, so that first imports happen in threads or not at all."""
    import subprocess
    import sys

    code = (
        "import sys, threading, convscale as cs\n"
        "art, paths, barrier, said = cs.load_artifact(sys.argv[1]), sys.argv[2:], threading.Barrier(8), []\n"
        "def ask():\n"
        "    barrier.wait()\n"
        "    said.append([(a.labels, a.error) for a in art.classify(paths)])\n"
        "threads = [threading.Thread(target=ask) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert len(said) == 8 and all(one == said[0] for one in said)\n"
        "print(said[0])\n"
    )
    command = [sys.executable, "-c", code, str(onnx_art.folder), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == str([(a.labels, a.error) for a in onnx_art.classify(files)])
