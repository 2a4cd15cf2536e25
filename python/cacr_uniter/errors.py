"""The one exception for problems that the person at the keyboard can solve. Imports nothing."""


class UserError(Exception):
    """An expected problem: a missing file, a corrupt record, a wrong option.

    The message is one or two sentences: what is wrong, where, and what to do. The `cacr` command prints it without a
    traceback and exits with status 2; of several processes the first one prints it.
    """


class ProcessError(UserError):
    """A problem that one process of several can have alone, such as full memory: each prints its own."""
