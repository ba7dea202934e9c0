"""The error that a user can do something about."""

__all__ = ['UserError']


class UserError(RuntimeError):
    """A failure that the user can mend: the message says what was given, what was expected, and what to do next."""
