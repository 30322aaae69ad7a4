"""POVID: preference tuning of vision-language models with AI-generated dispreferences (arXiv 2402.11411)."""
