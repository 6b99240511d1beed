"""The one error that users are meant to see."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: bad input, a bad setting, an unreachable budget.

    The message is one line that names the file, column or key, the value found and the mend. The
    command line prints it without a traceback and exits with status 2.
    """


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns a hint naming the choice most like `word`, or all choices if none is like it."""
    known = sorted(choices)
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(known)}"
