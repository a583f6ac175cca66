"""A signal after OpenVINO was let go of by another thread."""

import subprocess
import sys

import pytest

# Without the former stack back, this ends with SIGSEGV at its first signal.
_LET_GO = """
import gc, os, signal, sys, threading
from convscale.runtimes.base import Opening, open_runtime
runners = [open_runtime(sys.argv[1], "openvino", Opening(threads=1))]
thread = threading.Thread(target=lambda: (runners.clear(), gc.collect()))
thread.start()
thread.join()
seen = []
signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
for _ in range(20):
    os.kill(os.getpid(), signal.SIGUSR1)
print(len(seen))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="alternate stacks are put back on Linux")
def test_a_signal_is_handled_after_openvino_was_let_go_of_elsewhere(onnx_art):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LET_GO, str(onnx_art.model_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["20"]), done.stderr
