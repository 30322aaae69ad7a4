"""Preference data: the record, its readers, its tokens and the Lightning data module."""
