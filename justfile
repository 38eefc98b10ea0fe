# Every verb of development. `just` is in the dev extra (rust-just): .venv/bin/just
export PATH := justfile_directory() / ".venv/bin:" + env("PATH")
export HF_HUB_OFFLINE := "1"

# what must pass before a commit: format, lint, types, import contracts, fast tests
check: format-check lint types contracts test

format:
    ruff format
    ruff check --fix

format-check:
    ruff format --check

lint:
    ruff check

types:
    mypy

contracts:
    lint-imports

test *args:
    OPENBLAS_NUM_THREADS=1 pytest -n 2 {{args}}

# full-size weights and training: about 20 minutes
test-slow *args:
    pytest -m slow --timeout 3600 {{args}}

# README's and docs' generated parts, and the manifest's JSON Schema
docs:
    python docs/generate.py

# every extra pinned with hashes, and no download address
lock:
    uv pip compile pyproject.toml --universal --python-version 3.11 --all-extras --generate-hashes \
      --no-header --no-emit-index-url --no-annotate -q -o requirements.lock

# retrain the demo model and its sample images from the packages that ship them
train-demo out="demo-model":
    python -m medge.demo.train --out {{out}}

# full-size seeded weights, ratios in one run, on a quiet machine: `peers` (needs that extra, 12 GB of disk) or `formats`
bench-full race="peers" dir="full-size" *rounds:
    python -m medge.benchmarks.full_size {{race}} {{dir}} {{rounds}}

# medge's GGUF exports and decoding against llama.cpp's own programs, full size, on a quiet machine: 25 GB of disk
bench-llama dir="bench-llama" *rounds:
    python -m medge.benchmarks.chat_race {{dir}} {{rounds}}

# the real Gemma 3 270M, fetched into DIR (Gemma's terms): what each scheme costs it, as docs/real_weights.md
real-gemma dir:
    python -m medge.benchmarks.real_gemma {{dir}} docs/real_weights.json
    python docs/generate.py
