"""The embedded world: painted scenes, their captions and questions, and the tiny model trained on them."""
