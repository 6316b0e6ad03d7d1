"""One base for everything that a user can mend: the command line prints such an error as one line."""


class FermiSVDError(ValueError):
    """Bad input: the message names the file, tensor or option."""
