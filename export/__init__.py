"""Checkpoints in, artifact folders out."""
