"""The two errors that a user is meant to read: one line each, and an exit status.

Everything else that is raised is a defect of the program and keeps its traceback. Messages name the path, the
value, what was expected and what to do.
"""


class UserError(Exception):
    """Something outside the program is wrong: a file, a value, a checkpoint. Exit status 1."""

    exit_status = 1


class UsageError(UserError):
    """The command line or the config is wrong. Exit status 2."""

    exit_status = 2
