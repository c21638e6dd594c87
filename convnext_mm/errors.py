"""The error for mistakes that a user can fix."""
import sys


class UserError(ValueError):
    """A mistake in the user's input; the message says what was expected and what to do.

    The tools print only the message, without a traceback, and exit with status 2.
    """


def print_error(message: str) -> None:
    """Print the message of an error that ends the process."""
    print(f'\nError: {message}', file=sys.stderr, flush=True)
