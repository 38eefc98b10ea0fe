"""A doctor, a patient and a laboratory: agents over `medge serve`, after AgentClinic (arXiv:2405.07960).

    medge serve medgemma=medgemma-4b-int4
    python docs/examples/agent_clinic.py --model medgemma

The doctor knows the presentation alone. It acts by function calls: it asks the patient, orders a measurement, or names
a diagnosis, which ends the consultation. The patient is a second conversation with the same model, which knows the
history; the laboratory is a table. At the end a moderator says, in constrained JSON, whether the diagnosis is that of
the case. A model that cannot reason will still run to the end: each step is constrained to a valid call. What it then
says is worth nothing. No answer of it is medical advice.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

CASE = Path(__file__).with_name("clinic_case.json")
DOCTOR = (
    "You are a doctor who sees a patient for the first time. Each turn, call one function: ask the patient one"
    " question, order one measurement, or give your diagnosis once you are sure of it."
)
PATIENT = (
    "You are a patient at the doctor's. Answer the doctor's question in one or two plain sentences, from what follows"
    " alone. You do not know what you have. If it is not there, say that you do not know.\n\n"
)
MODERATOR = "Do these two name the same disease? Answer in JSON.\nFirst: {}\nSecond: {}"
VERDICT = {"type": "object", "properties": {"same": {"type": "boolean"}}, "required": ["same"]}


def tool(name: str, what: str, argument: str) -> Any:
    """A function with one text as its argument. Bounded: a small model may not find the end of it."""
    properties = {argument: {"type": "string", "minLength": 1, "maxLength": 200}}
    parameters = {"type": "object", "properties": properties, "required": [argument], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": what, "parameters": parameters}}


TOOLS = [
    tool("ask_patient", "Asks the patient a question.", "question"),
    tool("measure", "Orders an examination or a laboratory test and gives its result.", "test"),
    tool("diagnose", "Names the disease and ends the consultation.", "disease"),
]
DIAGNOSE: Any = {"type": "function", "function": {"name": "diagnose"}}


@dataclass
class Clinic:
    """One consultation."""

    client: openai.OpenAI
    model: str
    case: dict[str, Any]
    tell: Callable[[str], None] = lambda line: None
    """Hears what is said, line by line."""
    asked: list[Any] = field(default_factory=list)
    """The patient's conversation."""
    steps: list[tuple[str, str, str]] = field(default_factory=list)
    """Function, argument and result of each turn."""

    def consult(self, turns: int) -> str:
        """The diagnosis, after at most `turns` calls; the last one must be it."""
        messages: list[Any] = [
            {"role": "system", "content": DOCTOR},
            {"role": "user", "content": f"{self.case['presentation']} You have {turns} turns."},
        ]
        for left in range(turns, 0, -1):
            answer = self.client.chat.completions.create(
                model=self.model,
                messages=messages,
                tools=TOOLS,
                tool_choice="required" if left > 1 else DIAGNOSE,
                parallel_tool_calls=False,
            )
            message = answer.choices[0].message
            call: Any = (message.tool_calls or [])[0]
            name, (argument,) = call.function.name, json.loads(call.function.arguments).values()
            if name == "diagnose":
                self._note(name, argument, "")
                return str(argument)
            result = self.patient(argument) if name == "ask_patient" else self.measurement(argument)
            self._note(name, argument, result)
            messages += [message, {"role": "tool", "tool_call_id": call.id, "content": result}]
        raise AssertionError("the last turn is a diagnosis")

    def patient(self, question: str) -> str:
        """What the patient says."""
        self.asked.append({"role": "user", "content": question})
        known: Any = {"role": "system", "content": PATIENT + "\n".join(self.case["history"])}
        answer = self.client.chat.completions.create(model=self.model, messages=[known, *self.asked], max_tokens=100)
        said = answer.choices[0].message.content or "I do not know."
        self.asked.append({"role": "assistant", "content": said})
        return said

    def measurement(self, test: str) -> str:
        """What the table has; like AgentClinic's, it calls normal what the case does not mention."""
        found = [
            f"{name}: {value}" for name, value in self.case["measurements"].items() if name.lower() in test.lower()
        ]
        return "; ".join(found) or f"{test}: normal"

    def agrees(self, diagnosis: str) -> bool:
        """Whether the moderator takes it for the case's."""
        wanted: Any = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": VERDICT, "strict": True}}
        question: Any = {"role": "user", "content": MODERATOR.format(diagnosis, self.case["diagnosis"])}
        answer = self.client.chat.completions.create(model=self.model, messages=[question], response_format=wanted)
        return bool(json.loads(answer.choices[0].message.content or "")["same"])

    def _note(self, name: str, argument: str, result: str) -> None:
        self.steps.append((name, argument, result))
        self.tell(f"{name}: {argument}" + (f"\n  -> {result}" if result else ""))


def main() -> None:
    """Run one consultation and say how it ended."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True, help="an id of /v1/models")
    parser.add_argument("--case", type=Path, default=CASE)
    parser.add_argument("--turns", type=int, default=12)
    given = parser.parse_args()
    client = openai.OpenAI(base_url=given.url, api_key="none")  # or the server's key
    case = json.loads(given.case.read_text(encoding="utf-8"))
    clinic = Clinic(client, given.model, case, tell=lambda line: print(line, file=sys.stderr))  # noqa: T201
    diagnosis = clinic.consult(given.turns)
    result = {"diagnosis": diagnosis, "case": case["diagnosis"], "same": clinic.agrees(diagnosis)}
    sys.stdout.write(json.dumps({**result, "turns": len(clinic.steps)}) + "\n")


if __name__ == "__main__":
    main()
