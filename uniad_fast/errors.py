"""The base of every error that is the user's to fix: a bad file, a bad option, a machine that lacks something."""


class UniadFastError(ValueError):
    """Something handed in can't be used; the message says what and why. Every error class of the package is one."""
