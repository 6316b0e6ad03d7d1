"""One base for everything that a user can mend: the command line prints such an error as one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class FermiSVDError(ValueError):
    """Bad input: the message names the file, tensor or option."""


class FormatError(FermiSVDError):
    """A model's folder, a checkpoint or its record is not what it says of itself."""


class OptionError(FermiSVDError):
    """An option's or argument's value makes no sense, or not together with another's or for this model."""


class NumericalError(FermiSVDError):
    """What a model or a step computes is NaN, infinite, or beyond its type."""


class OutputError(FermiSVDError):
    """OUT or the work directory cannot be made, locked or written, or something else is there."""


def reason(error: object) -> str:
    """All that an error, or a library's message, says, in one line; with its kind where the words alone say nothing."""
    text = " ".join(str(error).split())
    told = isinstance(error, (KeyError, IndexError, AttributeError, TypeError)) or not text
    return f"{type(error).__name__}{': ' if text else ''}{text}" if told else text


@contextmanager
def explained(kind: type[FermiSVDError], subject: object, remedy: str = "") -> Iterator[None]:
    """The boundary around a library's call: whatever it raises comes out as `kind`, one line that names the subject,
    gives the whole reason and then the remedy. What has been explained already passes.

    Libraries promise no list of what they raise: tokenizers raises bare Exception, transformers whatever a config's
    strange values or a model's own code lead to.
    """
    try:
        yield
    except FermiSVDError:
        raise
    except Exception as error:
        raise kind(f"{subject}: {reason(error)}{remedy}") from error
