"""The one exception for what a user can mend."""


class Fault(Exception):
    """Something a user can mend, told in one sentence: the file, record or key at fault, what was found, what to do.

    Commands catch it, print ``error: <sentence>`` and exit with status 2; nobody sees a traceback for a typing error.
    """
