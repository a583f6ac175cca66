"""Train images that can not be read, counted by all processes that train together."""

from __future__ import annotations

from convscale.learn.job import Job
from convscale.learn.loader import check_bad_rate


class BadImages:
    """What was wrong with images of the train set, and whether it is too much.

    Each of several processes reads its own part of an epoch and knows of these alone until the epoch's end, where
    ``joined`` puts them together. In other epochs the parts are others, so a part's own rate says little.

    Args:
        job: processes, the train set, and the share of it that may be unreadable.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.known: dict[str, None] = {}
        """Each problem once."""

    def count(self, bad: tuple[str, ...]) -> None:
        """Add a batch's.

        Raises:
            UserError: those known here are too many for the whole set.
        """
        self.known |= dict.fromkeys(bad)
        if bad:
            self._check()

    def joined(self) -> tuple[str, ...]:
        """Those of all processes, which all must ask for together.

        Raises:
            UserError: they are too many; in all processes alike, so that none waits for another.
        """
        every = self._job.processes.gather(tuple(self.known))
        self.known = dict.fromkeys(problem for each in every for problem in each)
        self._check()
        return tuple(self.known)

    def _check(self) -> None:
        check_bad_rate(tuple(self.known), len(self._job.loader.split), self._job.max_bad_rate, "train")
