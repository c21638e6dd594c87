"""The error for what a user can mend."""


class UserError(ValueError):
    """A mistake in what the user gave: the message says what was expected and what to do.

    The tools print the message alone, without a traceback, and exit with status 2.
    """
