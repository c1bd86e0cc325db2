"""The two ways a command can end badly, told apart so that the exit code can tell too."""


class UserError(ValueError):
    """The user's mistake: the message says what was wrong, where, and what to do. Exit code 2."""


class Failure(RuntimeError):
    """The command did not reach its goal although it was asked rightly. Exit code 1."""
