"""Where released weights are looked for: a folder, the hub's cache, a hub on this machine."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from convscale.arch.tags import all_tags
from convscale.networks.weight_files import WeightFiles

TAG = "tf_efficientnet_lite0.in1k"


@pytest.mark.parametrize(
    "place",
    [
        "tf_efficientnet_lite0.in1k.safetensors",
        "tf_efficientnet_lite0.in1k.pth",
        "tf_efficientnet_lite0.in1k/model.safetensors",
        "models--timm--tf_efficientnet_lite0.in1k/snapshots/0a1b/pytorch_model.bin",
    ],
)
def test_a_folder_is_searched_by_tag_and_as_the_hubs_cache(tmp_path, place, monkeypatch):
    monkeypatch.setattr(WeightFiles, "_cached", staticmethod(lambda tag: None))
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x")
    files = WeightFiles(folder=tmp_path)
    assert files.find(TAG) == file
    assert files.reach(TAG) == file
    assert files.find("tf_efficientnet_lite1.in1k") is None
    files.check_folder(all_tags())


def test_of_several_snapshots_the_one_of_the_main_branch_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(WeightFiles, "_cached", staticmethod(lambda tag: None))
    cached = tmp_path / f"models--timm--{TAG}"
    for commit in ("0a", "1b", "2c"):
        (cached / "snapshots" / commit).mkdir(parents=True)
        (cached / "snapshots" / commit / "model.safetensors").write_bytes(b"x")
    files = WeightFiles(folder=tmp_path)
    assert files.find(TAG) == cached / "snapshots" / "0a" / "model.safetensors"
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1b")
    assert files.find(TAG) == cached / "snapshots" / "1b" / "model.safetensors"
    (cached / "snapshots" / "1b" / "model.safetensors").unlink()
    assert files.find(TAG) == cached / "snapshots" / "0a" / "model.safetensors"


def test_files_of_other_names_are_told(tmp_path):
    (tmp_path / "mine.pth").write_bytes(b"x")
    files = WeightFiles(folder=tmp_path)
    with pytest.raises(ValueError, match=r"holds mine\.pth; files must be named by tag, as in tf_efficientnet_lite0"):
        files.check_folder(all_tags())
    (tmp_path / "tf_efficientnet_lite0.in1k.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds mine\.pth; files must be named by tag"):
        files.check_folder(all_tags())
    (tmp_path / "mine.pth").rename(tmp_path / "README.md")
    (tmp_path / "old.pth").mkdir()
    files.check_folder(all_tags())  # what is no file of weights may lie beside them
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="is empty; files must be named by tag"):
        WeightFiles(folder=empty).check_folder(all_tags())
    with pytest.raises(ValueError, match=r"weights folder .*nowhere does not exist"):
        WeightFiles(folder=tmp_path / "nowhere")


class Hub(BaseHTTPRequestHandler):
    """Answers, whatever is asked."""

    def do_HEAD(self) -> None:
        self.send_response(403)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_that_answers_is_asked_for_what_no_file_has(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(WeightFiles, "_cached", staticmethod(lambda tag: None))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    assert WeightFiles().reach(TAG) == "pretrained"  # refused is answered
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert WeightFiles().reach(TAG) is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert WeightFiles().reach(TAG) is None
