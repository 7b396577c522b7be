"""Renders conversations with transformers' apply_chat_template; run beside the templates: python make_golden.py"""
import json, pathlib
from transformers.utils.chat_template_utils import render_jinja_template

here = pathlib.Path(__file__).parent
user = lambda text: {"role": "user", "content": text}
said = lambda text: {"role": "assistant", "content": text}
system = {"role": "system", "content": "Be brief.\nAnswer in <one> word & no more."}
tools = [{"type": "function", "function": {"name": "weather", "description": "The weather \u2013 \"now\"", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}}}]
call = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2, "exact": True}}}]}
chats = {
    "single": ([user("What is 2 + 2?"), said("4")], None),
    "system": ([system, user("  Hello  "), said("Hi.")], None),
    "turns": ([user("a\n\nb"), said("c"), user("d"), said("  e f\n"), user("{{ g }} 🦀")], None),
    "tools": ([system, user("Weather?"), call, {"role": "tool", "content": "{\"t\": 3}"},
               {"role": "tool", "content": "4"}, said("Cold.")], tools),
    "thoughts": ([user("a"), said("<think>\nhm\n</think>\n\nb"), user("c"), {**said("d"), "reasoning_content": "e"}], None),
}
special = {"bos_token": "<s>", "eos_token": "</s>"}
out = {}
for path in sorted(here.glob("*.jinja")):
    template = path.read_text()
    for name, (messages, tools_) in chats.items():
        for prompt in (False, True):
            try:
                text, = render_jinja_template([messages], tools=tools_, chat_template=template,
                                              add_generation_prompt=prompt, **special)[0]
            except Exception as error:
                text = None
                print(path.name, name, error)
            spans = None
            if "{% generation %}" in template or "{%- generation" in template:
                rendered, ranges = render_jinja_template([messages], tools=tools_, chat_template=template,
                                                         add_generation_prompt=prompt,
                                                         return_assistant_tokens_mask=True, **special)
                spans = [[len(rendered[0][:a].encode()), len(rendered[0][:b].encode())] for a, b in ranges[0]]
            out[f"{path.stem}/{name}/{'prompt' if prompt else 'whole'}"] = {
                "messages": messages, "tools": tools_, "prompt": prompt, "text": text, "generated": spans}
(here / "rendered.json").write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n")
