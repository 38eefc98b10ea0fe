"""The worked example: agents that consult, over a model that follows a script and over one that cannot reason."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.serve.conftest import Running, Scripted

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "agent_clinic.py"
Script = Callable[..., AbstractContextManager[tuple[Scripted, Running]]]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("agent_clinic", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["agent_clinic"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def call(name: str, **arguments: str) -> tuple[str]:
    return (json.dumps({"name": name, "parameters": arguments}),)


def test_a_consultation(scripted: Script, example: ModuleType) -> None:
    case = json.loads(example.CASE.read_text())
    says = [
        call("ask_patient", question="Where does it hurt?"),
        ("On the lower right.",),
        call("measure", test="White blood cell count and C-reactive protein"),
        call("measure", test="MRI of the knee"),
        call("diagnose", disease="Appendicitis"),
        ('{"same": true}',),
    ]
    with scripted(*says) as (model, server), server.openai() as client:
        clinic = example.Clinic(client, "scripted", case)
        diagnosis = clinic.consult(turns=8)
        assert (diagnosis, clinic.agrees(diagnosis)) == ("Appendicitis", True)
    names = [name for name, _, _ in clinic.steps]
    assert names == ["ask_patient", "measure", "measure", "diagnose"]
    assert clinic.steps[0][2] == "On the lower right."
    assert "14.2 thousand" in clinic.steps[1][2]
    assert "48 mg/L" in clinic.steps[1][2]
    assert clinic.steps[2][2] == "MRI of the knee: normal"
    doctor, patient = model.asked[4][0], model.asked[1][0]
    assert [message.role for message in doctor] == ["system", "user", *["assistant", "user"] * 3]
    assert "On the lower right." in str(doctor[3].content[0])
    assert case["diagnosis"] not in "".join(str(message.content) for message in (*doctor, *patient))
    assert patient[-1].content == ("Where does it hurt?",)
    assert all(options.schema for _, options in (model.asked[0], model.asked[5]))


def test_a_model_that_cannot_reason_runs_to_the_end(server: Running) -> None:
    command = [sys.executable, str(EXAMPLE), "--url", f"{server.url}/v1", "--model", "chat", "--turns", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    result: Any = json.loads(done.stdout)
    assert set(result) == {"diagnosis", "case", "same", "turns"}
    assert 1 <= result["turns"] <= 3
    assert "diagnose: " in done.stderr
