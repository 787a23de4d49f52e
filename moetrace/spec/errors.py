"""The errors that a user may see: one sentence each, saying what, where and what to do."""


class MoetraceError(Exception):
    """Something failed in a way that the message explains; commands print the message and exit with 1."""

    exit_code = 1


class UsageError(MoetraceError):
    """What was asked for makes no sense (a wrong name, value or combination); commands exit with 2."""

    exit_code = 2
