"""Write what the code knows into README and docs; `--check` fails when a file has fallen behind."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

from medge.benchmarks.real_gemma import RealWeights, table
from medge.export.formats import rows
from medge.manifest import json_schema
from medge.quantize.scheme import load, names
from medge.serve.limits import Limits

ROOT = Path(__file__).parent.parent


def targets_table() -> str:
    """README's matrix: one row for all models that a format builds alike."""
    lines = ["| models | format | " + " | ".join(names()) + " |", "|---|---|" + "---|" * len(names())]
    for row in rows():
        marks = ("✓" if cell.ok else "" for cell in row.cells.values())
        lines.append(f"| {', '.join(row.models)} | {row.format} | {' | '.join(marks)} |")
    return "\n".join(lines)


def reasons_table() -> str:
    """Why the empty cells are empty."""
    lines = ["| models | format | schemes | why not |", "|---|---|---|---|"]
    for row in rows():
        for reason, schemes in row.reasons.items():
            lines.append(f"| {', '.join(row.models)} | {row.format} | {', '.join(schemes)} | {reason} |")
    return "\n".join(lines)


def schemes_table() -> str:
    """The schemes with their titles."""
    rows = ["| scheme | what it is | activations |", "|---|---|---|"]
    rows += [f"| `{s.name}` | {s.title} | {s.activations} |" for s in map(load, names())]
    return "\n".join(rows)


def limits_table() -> str:
    """The server's limits with their defaults."""
    rows = ["| limit | default | what |", "|---|---|---|"]
    rows += [f"| `{f.name}` | {f.default:,} | {f.metadata['what']} |" for f in dataclasses.fields(Limits)]
    return "\n".join(rows)


def fill(text: str, mark: str, body: str) -> str:
    """Replace what stands between <!-- mark --> and <!-- /mark -->."""
    pattern = rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{body}\n{found[2]}", text, flags=re.DOTALL)


def generated() -> dict[Path, str]:
    """Every generated file with what it should hold."""
    readme, schemes, formats = ROOT / "README.md", ROOT / "docs/schemes.md", ROOT / "docs/formats.md"
    weights = ROOT / "docs/real_weights.md"
    measured = table(RealWeights.load(weights.with_suffix(".json")))
    serve = ROOT / "docs/serve.md"
    matrix = fill(formats.read_text(encoding="utf-8"), "targets", targets_table())
    return {
        readme: fill(readme.read_text(encoding="utf-8"), "targets", targets_table()),
        schemes: fill(schemes.read_text(encoding="utf-8"), "schemes", schemes_table()),
        formats: fill(matrix, "reasons", reasons_table()),
        weights: fill(weights.read_text(encoding="utf-8"), "real-weights", measured),
        serve: fill(serve.read_text(encoding="utf-8"), "limits", limits_table()),
        ROOT / "docs/manifest.schema.json": json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n",
    }


def main() -> int:
    """Write, or with --check compare."""
    stale = [
        path for path, text in generated().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(ROOT)} is behind the code: run `just docs`\n")
        return 1 if stale else 0
    for path in stale:
        path.write_text(generated()[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
