"""One file a model family. Adding a family is adding a file and a line in registry.py."""
