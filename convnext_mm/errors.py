"""The error for mistakes that a user can fix."""


class UserError(ValueError):
    """A mistake in the user's input; the message says what was expected and what to do.

    The tools print only the message, without a traceback, and exit with status 2.
    """
