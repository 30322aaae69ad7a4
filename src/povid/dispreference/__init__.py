"""Dispreferred responses made by an AI (Table 6) or from object co-occurrence."""
