"""An agent loop in Python: the model calls a weather and a calculator tool until it has what it needs for an answer.

    python agent_loop.py [-target HOST:PORT] [-force] [QUESTION]

Only results are sent, and only results are computed: the question, the tools and the calls are in the agent's context
already. Needs `pip install warmkv` alone, and a server whose model has tools.
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
from collections.abc import Callable

from warmkv import v1
from warmkv.client import Answer, Client

MOST_ROUNDS = 10
DEGREES = {"Bern": 11, "Uri": 7, "Zürich": 12}


def weather(place: str) -> str:
    if place not in DEGREES:
        raise ValueError(f"nobody measures in {place}, but in {', '.join(DEGREES)}")
    return json.dumps({"sky": "rain", "degrees": DEGREES[place]})


def calculate(expression: str) -> str:
    return str(_value(ast.parse(expression, mode="eval").body))


OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def _value(node: ast.expr) -> float:
    """Numbers and the four operations, and nothing else that Python could do."""
    match node:
        case ast.Constant(int() | float() as number):
            return number
        case ast.BinOp(left, operation, right) if type(operation) in OPERATORS:
            return OPERATORS[type(operation)](_value(left), _value(right))
        case ast.UnaryOp(operation, operand) if type(operation) in OPERATORS:
            return OPERATORS[type(operation)](_value(operand))
    raise ValueError(f"{ast.unparse(node)} is more than numbers with + - * /")


FUNCTIONS: dict[str, Callable[..., str]] = {"weather": weather, "calculate": calculate}
TOOLS = [
    v1.Tool(
        name="weather",
        description="The weather at a place, in degrees Celsius.",
        parameters_json='{"type": "object", "properties": {"place": {"type": "string", "maxLength": 40}}, '
        '"required": ["place"], "additionalProperties": false}',
    ),
    v1.Tool(
        name="calculate",
        description="The value of an expression of numbers with + - * / and parentheses.",
        parameters_json='{"type": "object", "properties": {"expression": {"type": "string", "maxLength": 60}}, '
        '"required": ["expression"], "additionalProperties": false}',
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("question", nargs="?", default="How many degrees Fahrenheit does it have in Zürich?")
    parser.add_argument("-target", "--target", default="127.0.0.1:50051")
    parser.add_argument("--agent", default="loop")
    parser.add_argument("-force", action="store_true", help="have the first answer ask for the weather, whatever it is")
    given = parser.parse_args()
    with Client(given.target) as client:
        client.delete(given.agent, allow_missing=True)
        print(loop(client, given.agent, given.question, given.force).text)


def loop(client: Client, agent: str, question: str, force: bool) -> Answer:
    """Ask, do what the answer calls, and send what came of it, until an answer calls nothing."""
    choice = v1.ToolChoice(mode=v1.TOOL_CHOICE_MODE_REQUIRED, allowed_names=["weather"], max_calls=1) if force else None
    for tool in TOOLS:
        tool.strict = force  # then the arguments are of the tool's schema, too
    asked = v1.ChatMessages(messages=[v1.ChatMessage(role="user", content=question)], tools=v1.ToolList(tools=TOOLS))
    for _ in range(MOST_ROUNDS):
        answer = client.chat(agent, v1.Content(chat=asked), max_tokens=256, tool_choice=choice)
        print(f"  {answer.cache.cached_tokens} tokens were there, {answer.cache.prefilled_tokens} were computed")
        if answer.finished.finish_reason != v1.FINISH_REASON_TOOL_CALLS:
            break
        choice = None
        asked = v1.ChatMessages(messages=[result_of(each) for each in answer.finished.tool_calls])
    return answer


def result_of(finished: v1.ToolCallFinished) -> v1.ChatMessage:
    """What came of a call. One that can't be done has a result, too: the model can mend it."""
    call = finished.call
    if finished.status == v1.TOOL_CALL_STATUS_VALID:
        try:
            said = FUNCTIONS[call.name](**json.loads(call.arguments_json))
        except (ValueError, SyntaxError, ZeroDivisionError) as error:
            said = f"error: {error}"
    else:
        said = f"error: {v1.ToolCallStatus.Name(finished.status)}"
    print(f"  {call.name}({call.arguments_json}) = {said}")
    return v1.ChatMessage(role="tool", tool_call_id=call.id, content=said)


if __name__ == "__main__":
    main()
