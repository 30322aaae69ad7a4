"""Dispreferred answers from AI (paper, section 3.1 and Table 6), or from object statistics without an endpoint."""
