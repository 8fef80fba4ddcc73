"""The errors that a user gets to read as one message."""


class ConfigError(ValueError):
    """Says where the mistake is, what was expected there and what came.

    Launch scripts print it, on three lines at most, and exit with code 2.
    """

    def __init__(self, where: object, expected: str, got: object) -> None:
        super().__init__(f"{where}: expected {expected}, got {got}")
        self.where, self.expected, self.got = where, expected, got

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.where, self.expected, self.got)  # to cross between processes


class TrainingError(RuntimeError):
    """Training cannot go on, and starting it again would not help; one message, exit code 1."""
