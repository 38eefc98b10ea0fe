"""The gate: does an artifact still give the reference's answers, how fast, and measured on what."""
