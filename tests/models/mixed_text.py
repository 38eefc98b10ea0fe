"""Text that finds where tokenizers part: reports, prose of many scripts, code, and seeded mixtures of what is odd."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import medge
from medge.benchmarks.chat_data import TEXTS

PROSE = (
    "FINDINGS: PA and lateral views. Heart size 14.5 cm, CTR 0.52. No focal consolidation, effusion or pneumothorax.\n"
    "IMPRESSION:\n1. No acute cardiopulmonary process.\n2. 6-mm nodule, RUL; follow-up CT in 12 months (Fleischner).",
    "Na 138 mmol/L, K⁺ 4.1, eGFR >60 mL/min/1.73m², HbA1c 7,2 %, T 38.6°C, BP 120/80, p<0.001, α-1-antitrypsin 1½×",
    "Die Herzgröße ist normal; kein Pleuraerguss. Übergangsfähige Röntgenthorax-Aufnahme, straßenweise geprüft.",
    "Œdème pulmonaire aigu : l'opacité s'est élargie, « sans épanchement », chez un garçon de 7 ans — à revoir.",
    "No se observan lesiones óseas; ¿cardiomegalia? ¡Sí! El niño respiró bien después del tratamiento.",
    "双肺纹理清晰，未见明显实变影。心影大小正常，两侧膈面光滑。建议三个月后复查。",
    "胸部X線写真では、右下肺野に浸潤影を認めます。心胸郭比は48％です。ｶﾀｶﾅ、ひらがな、漢字。",
    "لا يوجد انصباب جنبي أو استرواح الصدر. حجم القلب طبيعي، العمر ٤٥ سنة، السعال منذ أسبوعين.",
    "אין תפליט פלאורלי. צל הלב תקין.",
    "Лёгкие без очаговых изменений; сердце не увеличено. Рекомендован контроль через 3 месяца.",
    "फेफड़े साफ़ हैं, हृदय का आकार सामान्य है। ปอดใสทั้งสองข้าง ไม่พบน้ำในช่องเยื่อหุ้มปอด 폐에 이상 소견이 없습니다.",
    "Ο καρδιακός δείκτης είναι φυσιολογικός. Không có tràn dịch màng phổi. Akciğerler temiz, ığüşöç İI.",
    "🫁🩻 👩🏽‍⚕️👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 ❤️‍🔥 1️⃣ ☑︎ 👍🏿 e\u0301 vs é, ﬁ ﷺ ㎎ Å Ⅳ ½ ①",
    "def window(hu: float, *, low=-1024.0, high=1_024) -> int:\n\tif not low < hu:\n\t\traise ValueError(f'{hu}')\n"
    "    return round(255 * (hu - low) / (high - low))  # 8 bits\r\n",
    '{"id": "a1", "boxes": [[0.1, 2e-3, -4.5E+10, null]], "ok": true, "path": "C:\\\\dicom\\\\1.2.840.10008"}',
    "<html><body><h1>Report</h1><table>\n <tr><td>1</td></tr></table><b>bold</b></body></html> SELECT * FROM t;",
    "\\frac{d}{dx}\\left(e^{-x^2}\\right) = -2xe^{-x^2} ∑∫√∞≈≠≤ → ∀x∈ℝ",
    "https://example.org/a?b=c&d=%20#e me@example.org 2026-11-24T14:03:00Z 192.168.0.1 3.141592653589793238462643",
)
ODD = (
    *("<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>user\n", "<end_of_turn>\n", "<start_of_image>"),
    *(
        "<end_of_image>",
        "<unused7>",
        "[multimodal]",
        "<unused",
        "<0x41>",
        "<0x0A>",
        "</b>",
        "<td>",
        "<bos",
        "><",
        "<|im_end|>",
    ),
    *("\x00", "\x01\x02", "\x7f", "\x85", "\xa0", "\u200b", "\u200d", "\u2028", "\u3000", "\ufeff", "\ufffd", "\uffff"),
    *("\ue000", "\U0001f9ff", "\U000e0041", "\U0010ffff", "\ud7ff", "\u0300\u0301\u0302", "\r", "\r\n", "\v", "\f"),
    *(
        "▁",
        "▁▁",
        "▁▁▁",
        " ▁",
        "▁ ",
        "'s",
        "n't",
        "...",
        "----",
        "====",
        "0000000",
        "1234567890123456789",
        "0x1F",
        "1e-10",
    ),
)
_BLOCKS = (
    0x20,
    0xA0,
    0x370,
    0x5D0,
    0x900,
    0xE00,
    0x1F00,
    0x2190,
    0x2600,
    0x3040,
    0x4E00,
    0xAC00,
    0xF900,
    0x1D400,
    0x1F600,
)
"""Starts of Unicode ranges that characters are drawn from."""


def mixed(tokenizer: Path, *, seed: int = 0) -> Iterator[str]:
    """Texts: the prose, this package's own code, and mixtures of all that with pieces of the vocabulary itself."""
    yield from PROSE
    yield from TEXTS
    for path in sorted(Path(medge.__file__).parent.glob("*.py")):
        yield path.read_text("utf-8")
    rng, pieces = random.Random(seed), _pieces(tokenizer)  # noqa: S311 - no secret
    for _ in range(1500):
        yield "".join(_part(rng, pieces) for _ in range(rng.randint(1, 30)))


def _pieces(tokenizer: Path) -> list[str]:
    document: dict[str, Any] = json.loads(tokenizer.read_text("utf-8"))
    added = [str(one["content"]) for one in document["added_tokens"]]
    return [*(str(piece).replace("▁", " ") for piece in document["model"]["vocab"]), *added]


def _part(rng: random.Random, pieces: Sequence[str]) -> str:
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(" \n\t") * int(rng.paretovariate(0.7) % 70)
    if kind == 1:
        return rng.choice(ODD)
    if kind == 2:
        return "".join(chr(rng.choice(_BLOCKS) + rng.randrange(80)) for _ in range(rng.randint(1, 6)))
    if kind == 3:
        text = rng.choice(PROSE)
        start = rng.randrange(len(text))
        return text[start : start + rng.randint(1, 40)]
    if kind == 4:
        return str(rng.randrange(10 ** rng.randint(1, 18)))
    return rng.choice(pieces) + rng.choice(("", "", " "))
