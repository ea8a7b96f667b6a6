"""A model tuned on conversations answers and stops, with transformers and its folder alone."""

import json
import subprocess
import sys

import pytest

import tiny
from trainstack.prepare import prepare
from trainstack.storage import layout

# Of each family: its special tokens, how it writes a turn, how it invites the assistant.
FAMILIES = {
    "ChatML": (
        ("<|im_start|>", "<|im_end|>"),
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "Llama 3": (
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "{% if loop.first %}<|begin_of_text|>{% endif %}<|start_header_id|>{{ m.role }}"
        "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "Gemma": (
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        "{% if loop.first %}<bos>{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' "
        "else m.role }}\n{{ m.content | trim }}<end_of_turn>\n",
        "<start_of_turn>model\n",
    ),
}
ASK = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, words = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))
asked = words.apply_chat_template(
    [{"role": "user", "content": "one two"}], add_generation_prompt=True, return_tensors="pt",
    return_dict=True,
)
ids = model.generate(**asked, max_new_tokens=30, do_sample=False)[0, asked["input_ids"].shape[1]:]
print(words.decode(ids))
"""


def make_model(home, family: str) -> None:
    """A base model of the family: its own end token is not the one that ends turns."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    special, turn, invitation = FAMILIES[family]
    names = ["<|end|>", *special, *tiny.WORDS, "user", "assistant", "model", " ", "\n"]
    tokenizer = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|end|>", *special])
    asks = "{% if add_generation_prompt %}" + invitation + "{% endif %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    content = {
        "config.json": json.dumps({**tiny.CONFIG, "vocab_size": len(names)}),
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(settings),
        "chat_template.jinja": "{% for m in messages %}" + turn + "{% endfor %}" + asks,
    }
    tiny.publish(layout.model_folder(home, "chat"), content, kind="model", weight_bytes=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_tuned_model_answers_what_it_learned_and_stops(tmp_path, family):
    make_model(tmp_path, family)
    turns = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three four"}]
    lines = json.dumps({"messages": turns}) + "\n"
    tiny.publish(layout.dataset_folder(tmp_path, "chats", None), {"a.jsonl": lines * 100})
    names = {"model__name": "chat", "data__name": "chats", "data__packing": "best_fit"}
    tiny.write_config(
        tmp_path, **names, data__eval_fraction=0, eval__eval_steps=None,
        eval__prompts=["one two", [{"role": "user", "content": "one two"}]], eval__sample_tokens=12,
        train__max_steps=80, checkpoint__save_steps=80,
    )  # fmt: skip
    arguments = ["--home", str(tmp_path), "--config", str(tmp_path / "config.yaml")]
    assert prepare.main([*arguments, "--processes", "1"]) == 0
    log = tiny.train(tmp_path, 1, "run.name=r").stdout
    assert log.count("sample  one two -> three four\n") == 2, "a question, and messages"
    assert log.count("stopped by itself, after 4 tokens") == 2
    folder = layout.run_folder(tmp_path, "r") / "checkpoints" / "checkpoint-80"
    command = [sys.executable, "-c", ASK, folder]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    end = FAMILIES[family][0][-1]
    assert said == f"three four{end}\n"
