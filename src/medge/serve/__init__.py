"""Artifacts behind OpenAI's HTTP interface: chat completions, embeddings, models, and a page to try them.

`server.serve` is what `medge serve` runs; `app.create_app` gives the ASGI application alone. Nothing of a prompt, an
image or an answer is ever logged.
"""
