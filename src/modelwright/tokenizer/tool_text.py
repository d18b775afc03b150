"""Tools as plain text, for chat templates that know none: the form of Hermes 2 Pro and Qwen 2.5.

The system turn lists the functions; the assistant calls one with ``<tool_call>{"name": ..., "arguments": ...}
</tool_call>``; answers come back in a turn of the user as ``<tool_response>``, because many templates know no other
role and want turns to alternate. Nothing written here is a special token.

Source: the chat templates of NousResearch/Hermes-2-Pro-Mistral-7B and Qwen/Qwen2.5-7B-Instruct.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

SECTION = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def has_tool_turns(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a conversation holds calls of tools or their answers."""
    return any(row.get("tool_calls") or row.get("tool_call_id") for row in rows)


def write_tools(rows: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation whose tools, calls and answers stand in the texts of its turns."""
    turns: list[dict[str, Any]] = []
    is_answering = False
    for row in rows:
        turn = {name: value for name, value in row.items() if name not in ("tool_calls", "tool_call_id")}
        calls = [_call_text(call) for call in row.get("tool_calls") or ()]
        turn["content"] = "\n".join([*([row["content"]] if row["content"] or not calls else []), *calls])
        if row["role"] == "tool":
            text = f"<tool_response>\n{row['content']}\n</tool_response>"
            if is_answering:  # several answers share one turn
                turns[-1] = {**turns[-1], "content": turns[-1]["content"] + "\n" + text}
                continue
            turn = {"role": "user", "content": text}
        is_answering = row["role"] == "tool"
        turns.append(turn)
    if not tools:
        return turns
    section = SECTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if turns and turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{section}"}, *turns[1:]]
    return [{"role": "system", "content": section}, *turns]


def _call_text(call: Mapping[str, Any]) -> str:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {written}}}\n</tool_call>'
