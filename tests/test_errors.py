"""Errors that users read."""

import pickle

from irpe_ds.errors import DataError


def test_a_name_cannot_steer_the_terminal() -> None:
    error = DataError("\x1b]0;mine\x07/\udcff/ü.jpg", "an image", "\x1b[2J\r\u202enothing")
    expected = r"\x1b]0;mine\x07/\udcff/ü.jpg: expected an image, got \x1b[2J\r\u202enothing"
    assert str(error) == expected
    assert str(pickle.loads(pickle.dumps(error))) == expected


def test_what_was_found_is_shown_up_to_a_thousand_characters() -> None:
    assert len(str(DataError("label", "a name", 10_000 * "9"))) < 1100
    assert str(DataError("label", "a name", 10_000 * "9")).endswith("99...")
