"""The one exception that means: what the user gave cannot be used, and the message says why and what to do."""


class InputError(ValueError):
    """A file, option or value from outside is missing, damaged or does not fit.

    The message is one sentence for a person. The commands print it without a traceback and exit with status 1; every
    other exception is a defect of this package and keeps its traceback.
    """
