"""The error that a user can do something about."""


class UserError(RuntimeError):
    """A failure that the user can mend: the message says what was given, what was expected, and what to do next."""


class InUse(UserError):
    """Another process has the file or folder."""


def reason(error: BaseException) -> str:
    """What an error says, or its kind where it says nothing."""
    return str(error) or type(error).__name__
