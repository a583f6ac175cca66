"""Two runs at once, closed terminals, kills: nothing is lost and nothing is done twice."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.accidents.play import LIMIT_S, Accident, Play, Seen, Word, environment, start, wait
from benchmarks.accidents.stage import classes_in, log_of, long_training, saved, splits_in, until

KILLS = 50
"""Inside saves."""
_SEED = 0


def _ends(play: Play, child: subprocess.Popen[bytes], number: int, words: Sequence[Word]) -> Seen:
    return play.took(wait(child, play.talk, number=number), words)


def _two_trainings(play: Play) -> None:
    run = play.here / "run"
    words = long_training(play, run)
    first = start(words, play.talk, number=90)
    try:
        play.expect(until(lambda: saved(run)), "the first training saves nothing")
        for more in ((), ("--resume",), ("--overwrite",)):
            seen = play.forked(*words, *more)
            said = "being written by another run" if more else "being written by another run|exists and is not empty"
            play.refused(seen, said)
        play.expect(first.poll() is None, "the first training ended with it")
    finally:
        first.send_signal(signal.SIGTERM)
        seen = _ends(play, first, 90, words)
    play.expect(seen.code == 130, f"the first training ends with {seen.code}: {seen.line}")
    play.expect(saved(run), "its states are gone")
    epochs = [int(str(row["epoch"])) for row in log_of(run)]
    play.expect(epochs == sorted(set(epochs)), f"epochs in its log: {epochs}")


def _signal(number: signal.Signals) -> Callable[[Play], None]:
    def act(play: Play) -> None:
        epochs = 6
        whole, run = play.here / "whole", play.here / "run"
        play.done(play.forked(*long_training(play, whole, epochs)))
        words = long_training(play, run, epochs)
        child = start(words, play.talk, number=90)
        play.expect(until(lambda: saved(run)), "nothing is saved")
        child.send_signal(number)
        seen = _ends(play, child, 90, words)
        play.expect(seen.code in (0, 130), f"exit code {seen.code}: {seen.line}")
        stopped = len(log_of(run))
        play.done(play.forked(*words, "--resume"))
        got, right = log_of(run), log_of(whole)
        play.expect(len(got) == epochs, f"{len(got)} epochs in the log of {epochs}")
        same = [
            key
            for key in ("train_loss", "val_loss", "val_top1")
            if [r.get(key) for r in got] != [r.get(key) for r in right]
        ]
        play.expect(not same, f"stopped after {stopped} epochs, then {same} differ from an undisturbed run")

    return act


def _terminal(play: Play) -> None:
    """The terminal that a training writes to is closed: SIGHUP, and every further word is an error."""
    run = play.here / "run"
    words = long_training(play, run)
    master, slave = os.openpty()
    script = "import os, sys; os.setsid(); import fcntl, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); "
    script += "from convscale.cli.app import main; sys.argv[0] = 'convscale'; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", script, *map(os.fsencode, words)],
        stdin=slave, stdout=slave, stderr=slave, cwd=play.talk, env=environment(),
    )  # fmt: skip
    os.close(slave)
    os.set_blocking(master, False)
    heard = b""

    def heard_and_saved() -> bool:
        nonlocal heard
        with suppress(BlockingIOError):
            heard += os.read(master, 65536)  # or it would wait for a reader
        return saved(run)

    play.expect(until(heard_and_saved), f"nothing is saved: {heard[-200:]!r}")
    os.close(master)
    try:
        code = child.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        code = child.wait()
        play.problems.append("it goes on for 60 s")
    play.expect(code == 130, f"exit code {code}")
    play.expect(saved(run), "its states are gone")
    before = len(log_of(run))
    play.done(play.forked(*long_training(play, run, before + 1), "--resume"))
    play.expect(len(log_of(run)) >= before, "epochs are lost")


def _two_classifies(play: Play) -> None:
    data, output = classes_in(play.here / "data", 20), play.here / "rows.csv"
    paths = sorted(str(path) for path in data.rglob("*.png"))
    words = (
        "classify",
        "-",
        "--model",
        play.stage.artifact,
        "--output",
        output,
        "-b",
        "4",
        "--workers",
        "1",
        "--resume",
    )
    reading, writing = os.pipe()
    first = start(words, play.talk, number=90, stdin=reading)
    os.close(reading)
    with os.fdopen(writing, "w") as given:
        given.write("".join(f"{path}\n" for path in paths[:30]))
        given.flush()
        play.expect(until(output.exists), "the first writes nothing")
        time.sleep(0.2)
        again = "".join(f"{path}\n" for path in paths).encode()
        play.refused(play.fresh(*words, stdin=again), "being written by another run")
        given.write("".join(f"{path}\n" for path in paths[30:]))
    play.done(_ends(play, first, 90, words))
    play.done(play.fresh(*words, stdin=again))
    rows = list(csv.DictReader(output.open(encoding="utf-8", newline="")))
    play.expect(
        [row["path"] for row in rows] == paths, f"{len(rows)} rows for {len(paths)} pictures, or in another order"
    )


def _killed_classifies(play: Play) -> None:
    data, output = classes_in(play.here / "data", 60), play.here / "rows.csv"
    paths = sorted(str(path) for path in data.rglob("*.png"))
    words = (
        "classify",
        data,
        "--model",
        play.stage.artifact,
        "--output",
        output,
        "-b",
        "1",
        "--workers",
        "1",
        "--resume",
    )
    chance, kills = random.Random(_SEED), 0
    for _ in range(6):
        before = output.stat().st_size if output.exists() else 0
        child = start(words, play.talk, number=90)
        most = before + chance.randint(1, 3000)
        until(
            lambda most=most, child=child: (
                child.poll() is not None or (output.exists() and output.stat().st_size >= most)
            )
        )
        if child.poll() is None:
            child.kill()
            kills += 1
        child.wait()
    play.expect(kills >= 3, f"only {kills} kills")
    play.done(play.forked(*words))
    rows = list(csv.DictReader(output.open(encoding="utf-8", newline="")))
    play.expect(
        [row["path"] for row in rows] == paths, f"{len(rows)} rows for {len(paths)} pictures, or in another order"
    )


def _kills(play: Play) -> None:
    """50 kills inside saves; the weights and losses at the end are those of an undisturbed run, bit for bit."""
    from benchmarks import kill_loop

    data, whole, killed = play.here / "data", play.here / "whole", play.here / "killed"
    kill_loop.write_pictures(data)
    ended, _ = _child(data, whole, play.here / "whole.txt")
    play.expect(ended == 0, "the undisturbed run fails")
    chance, inside, tries, losses = random.Random(_SEED), 0, 0, play.here / "killed.txt"
    saves = killed / "checkpoints"
    steps = kill_loop.STEPS_PER_EPOCH * kill_loop.EPOCHS
    while inside < KILLS and tries < 4 * KILLS:
        tries += 1
        done = len(kill_loop.read_losses(losses)) if losses.is_file() else 0
        further = max(1, min(12, (steps - done) // (KILLS - inside + 1)))
        ended, within = _child(
            data, killed, losses, kill_after=chance.randint(1, further), wait_s=chance.uniform(0, 0.004), saves=saves
        )
        inside += within
        if ended == 0:
            break
        play.expect(ended == -signal.SIGKILL, f"a child ended with {ended}")
    play.expect(inside >= KILLS, f"{inside} kills inside saves, of {tries}")
    ended, _ = _child(data, killed, losses)
    play.expect(ended == 0, f"after {inside} kills the run ends with {ended}")
    import torch

    right, got = kill_loop.weights_of(whole), kill_loop.weights_of(killed)
    play.expect(
        right.keys() == got.keys() and all(torch.equal(right[name], got[name]) for name in right), "other weights"
    )
    same = kill_loop.read_losses(play.here / "whole.txt").items() <= kill_loop.read_losses(losses).items()
    play.expect(same, "other losses")
    play.said.append(f"{inside} of {tries} kills inside a save")


def _child(
    data: Path, output: Path, losses: Path, *, kill_after: int = 0, wait_s: float = 0.0, saves: Path | None = None
) -> tuple[int, bool]:
    """A training in a forked process, killed inside the first save after so many steps. Its end, and whether a save was
    under way then.
    """
    from benchmarks import kill_loop

    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(nowhere, fd)
            kill_loop.child(data, output, losses, 0, "nchw")
            code = 0
        finally:
            os._exit(code)
    if not kill_after:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), False
    want = _lines(losses) + kill_after
    within = False
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if _lines(losses) >= want and saves is not None and any(saves.glob(".*.tmp")):
            time.sleep(wait_s)
            os.kill(pid, signal.SIGSTOP)  # so that what is looked at stays as it is
            within = any(saves.glob(".*.tmp"))
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.0005)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), within


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _temporaries(play: Play) -> None:
    """A run leaves alone what another writes: a resume while another training's save lies half done beside it."""
    run = play.here / "run"
    play.done(play.forked(*long_training(play, run, 1)))
    (run / "checkpoints" / ".step-00000009.abcdefgh.tmp").mkdir()
    play.done(play.forked(*long_training(play, run, 2), "--resume"))
    play.expect(not list((run / "checkpoints").glob(".*.tmp")), "what a killed run left is not removed")


def _broken_pipe(play: Play) -> None:
    """``convscale classify ... | head -1``."""
    data = splits_in(play.here / "data")
    reading, writing = os.pipe()
    command = [
        sys.executable,
        "-m",
        "convscale.cli",
        "classify",
        str(data),
        "--model",
        str(play.stage.artifact),
        "-b",
        "1",
    ]
    with open(play.talk / "90.err", "wb") as err:
        child = subprocess.Popen(command, stdout=writing, stderr=err, cwd=play.talk, env=environment())
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    code = child.wait(LIMIT_S)
    said = (play.talk / "90.err").read_text()
    play.expect("Traceback" not in said and len(said.strip().splitlines()) <= 1, f"exit code {code}: {said[-300:]!r}")


ACCIDENTS = [
    Accident(
        name="processes/two trainings", did="a second training in the folder, --resume, --overwrite", act=_two_trainings
    ),
    Accident(name="processes/two classifies", did="two classify --resume on one file", act=_two_classifies),
    *(
        Accident(
            name=f"processes/{number.name}", did=f"{number.name} to a training, then --resume", act=_signal(number)
        )
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
    ),
    Accident(name="processes/terminal", did="the terminal of a training is closed", act=_terminal),
    Accident(
        name="processes/kills in saves", did="50 SIGKILLs inside saves of a training, resumed each time", act=_kills
    ),
    Accident(
        name="processes/kills in classify", did="SIGKILL to classify, then --resume, six times", act=_killed_classifies
    ),
    Accident(name="processes/temporaries", did="a save that a killed run left half done", act=_temporaries),
    Accident(name="processes/broken pipe", did="classify | head -1", act=_broken_pipe),
]
