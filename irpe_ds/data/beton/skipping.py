"""Which bad images a conversion may leave out: few of them, and of no class all."""

from collections.abc import Collection, Iterable

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
        total: images of the source. None: those that the journal lists.
        elsewhere: classes with images in other journals.
    """

    def __init__(
        self,
        journal: Journal,
        on_bad: OnBad,
        max_bad: float,
        total: int | None = None,
        elsewhere: Collection[str] = (),
    ) -> None:
        self._on_bad, self._max_bad, self._elsewhere = on_bad, max_bad, elsewhere
        self._total = journal.totals()[0] if total is None else total
        self._skipped = journal.counts()["skipped"]
        self._category, self._good = journal.last_class()

    def enter(self, category: str | None) -> None:
        """The next image is of this class; None: there is none.

        Raises:
            DataError: every image of the class before it was skipped.
        """
        if category == self._category:
            return
        if self._category not in (None, *self._elsewhere) and not self._good:
            raise _only_bad(self._category)
        self._category, self._good = category, False

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
        got = f"the bad image number {self._skipped}, {member}: {reason}"
        _check_number(self._skipped, self._total, self._max_bad, got)


def check_all(classes: Iterable[tuple[str, int, int]], skipped: int, max_bad: float) -> None:
    """Check the journals of a source together.

    Args:
        classes: name, images listed, and images in a file.
        skipped: images in none.

    Raises:
        DataError: a class has only bad images, or too many are bad.
    """
    total = 0
    for name, listed, kept in classes:
        if listed and not kept:
            raise _only_bad(name)
        total += listed
    _check_number(skipped, total, max_bad, skipped)


def _only_bad(category: str | None) -> DataError:
    got = f"only bad ones in {category}: repair or add one, or leave out the class"
    return DataError("--on-bad skip", "a good image in every class", got)


def _check_number(skipped: int, total: int, max_bad: float, got: object) -> None:
    if skipped > max(FEW, max_bad * total):
        raise DataError("--max-bad", f"at most {max_bad:.3g} of {total} images to be bad", got)
