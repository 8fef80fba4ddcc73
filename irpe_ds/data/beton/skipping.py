"""Which bad images a conversion may leave out: few of them, and of no class all."""

from irpe_ds.data.beton.journal import Journal
from irpe_ds.data.beton.options import OnBad
from irpe_ds.data.beton.sources import Member
from irpe_ds.errors import DataError

FEW = 3
"""Bad images that may always be skipped: a share of a small data set is less than one."""


class BadImages:
    """Stops a conversion at a bad image, or lets it be skipped.

    Images come in the order of the journal, which is by class, so that a class without a good
    image is noticed where it ends and not after hours.

    Args:
        journal: what earlier calls have done counts too.
        on_bad: whether any may be skipped.
        max_bad: share of all images that may be, but at least FEW images.
    """

    def __init__(self, journal: Journal, on_bad: OnBad, max_bad: float) -> None:
        self._on_bad, self._max_bad = on_bad, max_bad
        self._total = journal.totals()[0]
        self._skipped = journal.counts()["skipped"]
        self._category, self._good = journal.last_class()

    def enter(self, category: str | None) -> None:
        """The next image is of this class; None: there is none.

        Raises:
            DataError: every image of the class before it was skipped.
        """
        if category == self._category:
            return
        if self._category is not None and not self._good:
            raise DataError("--on-bad skip", "a good image in every class", self._only_bad())
        self._category, self._good = category, False

    def _only_bad(self) -> str:
        return f"only bad ones in {self._category}: repair or add one, or leave out the class"

    def keep(self) -> None:
        """The image is good."""
        self._good = True

    def skip(self, member: Member, reason: str) -> None:
        """The image is bad.

        Raises:
            DataError: it may not be skipped.
        """
        if self._on_bad == "error":
            raise DataError(member, "an undamaged image, or --on-bad skip", reason)
        self._skipped += 1
        if self._skipped > max(FEW, self._max_bad * self._total):
            expected = f"at most {self._max_bad:.3g} of {self._total} images to be bad"
            got = f"the bad image number {self._skipped}, {member}: {reason}"
            raise DataError("--max-bad", expected, got)
