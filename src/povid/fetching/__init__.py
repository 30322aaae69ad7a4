"""Downloads: watched, checked and resumable, of single files, of many small ones, and from the Hugging Face hub."""
