"""The two kinds of error a user can cause, and the exit codes that go with them.

Everything else that goes wrong is a defect of ours and shows a traceback (exit code 1).
"""

from __future__ import annotations

import time

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_BAD_CONFIG = 2
EXIT_BAD_DATA = 3
_TELLING_S = 2.0


class UserError(Exception):
    """Base of errors that are shown without a traceback; ``exit_code`` tells the shell which kind."""

    exit_code = EXIT_FAILURE


class ConfigError(UserError):
    """One or more mistakes in the configuration. ``problems`` holds one readable line for each."""

    exit_code = EXIT_BAD_CONFIG

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """Data that is missing, damaged or not what its name says: what, where, and what to do."""

    exit_code = EXIT_BAD_DATA


def let_another_rank_tell() -> None:
    """For a rank that fails as all do and says nothing: torchrun ends all ranks as soon as one has ended, which must
    not come before the one that tells has told. Its end ends this wait.
    """
    time.sleep(_TELLING_S)
