# ruff: noqa: E501 - templates are long
"""Which tokens are the assistant's, in the shapes of ten chat templates; marked by hand with « and »."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from configs.errors import DataError
from eval.reference.chat import ChatTemplate, conversation_text
from trainer.data.tokenizer import make_tokenizer

SYSTEM, ASK, SAY, AGAIN, MORE = "Be brief.", "Hi there", "Hello. How?", "Well", "Good, then."
TURNS = [("user", ASK), ("assistant", SAY), ("user", AGAIN), ("assistant", MORE)]
LOOP = "{% for m in messages %}"
PROMPT = "{% if add_generation_prompt %}"
# Name: (template, special tokens, whether it takes a system prompt, what it renders with the assistant's part marked).
TEMPLATES = {
    "chatml": (
        LOOP
        + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        + PROMPT
        + "<|im_start|>assistant\n{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        True,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
        "«Hello. How?<|im_end|>»\n<|im_start|>user\nWell<|im_end|>\n<|im_start|>assistant\n«Good, then.<|im_end|>»\n",
    ),
    "llama 3": (
        "<|begin|>" + LOOP + "<|start_header|>{{ m['role'] }}<|end_header|>\n\n{{ m['content'] | trim }}<|eot|>"
        "{% endfor %}" + PROMPT + "<|start_header|>assistant<|end_header|>\n\n{% endif %}",
        ["<|begin|>", "<|start_header|>", "<|end_header|>", "<|eot|>"],
        True,
        "<|begin|><|start_header|>system<|end_header|>\n\nBe brief.<|eot|><|start_header|>user<|end_header|>\n\n"
        "Hi there<|eot|><|start_header|>assistant<|end_header|>\n\n«Hello. How?<|eot|>»<|start_header|>user<|end_header|>\n\n"
        "Well<|eot|><|start_header|>assistant<|end_header|>\n\n«Good, then.<|eot|>»",
    ),
    "mistral": (
        "<s>" + LOOP + "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
        ["<s>", "</s>", "[INST]", "[/INST]"],
        False,
        "<s>[INST] Hi there [/INST]« Hello. How?</s>»[INST] Well [/INST]« Good, then.</s>»",
    ),
    "gemma": (
        "<bos>" + LOOP + "<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
        "<end_of_turn>\n{% endfor %}" + PROMPT + "<turn>model\n{% endif %}",
        ["<bos>", "<turn>", "<end_of_turn>"],
        False,
        "<bos><turn>user\nHi there<end_of_turn>\n<turn>model\n«Hello. How?<end_of_turn>»\n<turn>user\nWell"
        "<end_of_turn>\n<turn>model\n«Good, then.<end_of_turn>»\n",
    ),
    "phi": (
        LOOP + "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}" + PROMPT + "<|assistant|>\n{% endif %}",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        True,
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi there<|end|>\n<|assistant|>\n«Hello. How?<|end|>»\n<|user|>\nWell"
        "<|end|>\n<|assistant|>\n«Good, then.<|end|>»\n",
    ),
    "zephyr": (
        LOOP + "<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}" + PROMPT + "<|assistant|>\n{% endif %}",
        ["</s>"],
        True,
        "<|system|>\nBe brief.</s>\n<|user|>\nHi there</s>\n<|assistant|>\n«Hello. How?</s>»\n<|user|>\nWell</s>\n"
        "<|assistant|>\n«Good, then.</s>»\n",
    ),
    "vicuna": (
        LOOP + "{% if m['role'] == 'system' %}{{ m['content'] }} {% elif m['role'] == 'user' %}USER: "
        "{{ m['content'] }} {% else %}ASSISTANT: {{ m['content'] }}</s>{% endif %}{% endfor %}"
        + PROMPT
        + "ASSISTANT:{% endif %}",
        ["</s>"],
        True,
        "Be brief. USER: Hi there ASSISTANT:« Hello. How?</s>»USER: Well ASSISTANT:« Good, then.</s>»",
    ),
    "alpaca, no special token": (
        LOOP + "{% if m['role'] == 'assistant' %}### Response:\n{{ m['content'] }}\n\n{% elif m['role'] == 'user' %}"
        "### Instruction:\n{{ m['content'] }}\n\n{% else %}{{ m['content'] }}\n\n{% endif %}{% endfor %}"
        + PROMPT
        + "### Response:\n{% endif %}",
        [],
        True,
        "Be brief.\n\n### Instruction:\nHi there\n\n### Response:\n«Hello. How?\n\n»### Instruction:\nWell\n\n"
        "### Response:\n«Good, then.\n\n»",
    ),
    "markers of its own": (
        LOOP + "<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>"
        "{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{{ '\\n' }}{% endfor %}",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        True,
        "<|system|>Be brief.<|end|>\n<|user|>Hi there<|end|>\n<|assistant|>«Hello. How?<|end|>»\n<|user|>Well<|end|>\n"
        "<|assistant|>«Good, then.<|end|>»\n",
    ),
    "command": (
        "<BOS>"
        + LOOP
        + "<|TURN|><|{{ m['role'] | upper }}|>{{ m['content'] | trim }}<|END_TURN|>{% endfor %}"
        + PROMPT
        + "<|TURN|><|ASSISTANT|>{% endif %}",
        ["<BOS>", "<|TURN|>", "<|SYSTEM|>", "<|USER|>", "<|ASSISTANT|>", "<|END_TURN|>"],
        True,
        "<BOS><|TURN|><|SYSTEM|>Be brief.<|END_TURN|><|TURN|><|USER|>Hi there<|END_TURN|><|TURN|><|ASSISTANT|>"
        "«Hello. How?<|END_TURN|>»<|TURN|><|USER|>Well<|END_TURN|><|TURN|><|ASSISTANT|>«Good, then.<|END_TURN|>»",
    ),
}


def folder_of(tmp_path: Path, template: str, special: list[str]) -> Path:
    make_tokenizer(tmp_path / "t", ["Hello there. How? Well, good then. Be brief. Hi"] * 9, given=None, vocab_size=290)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "t")
    return tmp_path / "t"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_tokens_are_those_marked_by_hand(name: str, tmp_path: Path) -> None:
    template, special, system, marked = TEMPLATES[name]
    folder = folder_of(tmp_path, template, special)
    messages = [
        {"role": role, "content": content} for role, content in ([("system", SYSTEM)] if system else []) + TURNS
    ]
    (found,) = ChatTemplate(folder).encode([conversation_text(messages)])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = marked.replace("«", "").replace("»", "")
    assert tokenizer.decode(found.ids.tolist()) == plain
    assert found.ids.tolist() == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    at = tokenizer(plain, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    wanted, inside, place = [], [], 0
    for character in marked:
        if character in "«»":
            place = int(character == "«")
        else:
            inside.append(place)
    wanted = [all(inside[start:stop]) for start, stop in at]
    assert found.scored.tolist() == wanted
    said = "".join(part.partition("»")[0] for part in marked.split("«")[1:])
    for token in special:
        said = said.replace(token, "")
    assert found.bytes == len(said.encode())


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    thinking = LOOP + "<|{{ m['role'] }}|>{% if not loop.last %}(short){% endif %}{{ m['content'] }}<|end|>{% endfor %}"
    folder = folder_of(tmp_path, thinking, ["<|end|>"])
    text = conversation_text([{"role": role, "content": content} for role, content in TURNS])
    with pytest.raises(DataError, match=r"writes a turn otherwise when others follow.*generation"):
        ChatTemplate(folder).encode([text])


def test_a_template_that_raises_names_the_conversation(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, TEMPLATES["mistral"][0], TEMPLATES["mistral"][1])
    text = conversation_text([{"role": "system", "content": SYSTEM}, {"role": "assistant", "content": SAY}])
    with pytest.raises(DataError, match=r"refuses a conversation: only user and assistant.*Be brief"):
        ChatTemplate(folder).encode([text])


def test_what_is_too_long_is_cut_at_its_end_and_counted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, *TEMPLATES["chatml"][:2])
    text = conversation_text([{"role": role, "content": content} for role, content in TURNS])
    (whole,) = ChatTemplate(folder).encode([text])
    (short,) = ChatTemplate(folder).encode([text], longest=20)
    assert short.ids.tolist() == whole.ids[:20].tolist()
    assert short.scored.tolist() == whole.scored[:20].tolist()
    assert short.cut == len(whole.ids) - 20


def test_tools_and_calls_go_through_the_template(tmp_path: Path) -> None:
    template = (
        "{% if tools %}<|tools|>{{ tools | tojson }}<|end|>{% endif %}" + LOOP + "<|{{ m['role'] }}|>"
        "{{ m['content'] or '' }}{% for call in m['tool_calls'] or [] %}{{ call | tojson }}{% endfor %}<|end|>{% endfor %}"
        + PROMPT
        + "<|assistant|>{% endif %}"
    )
    folder = folder_of(tmp_path, template, ["<|tools|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"])
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "Add"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]
    (found,) = ChatTemplate(folder).encode([conversation_text(messages, tools)])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(found.ids[found.scored].tolist()) == json.dumps(call) + "<|end|>Two<|end|>"
    assert tokenizer.decode(found.ids.tolist()).startswith("<|tools|>" + json.dumps(tools))
