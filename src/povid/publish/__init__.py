"""Runs on the Hugging Face hub: the folder of an adapter or a merged checkpoint, its model card, the upload."""
