"""The built-in demo: Python's own sources as data, a byte-level BPE trained on them, a small Llama.

Needs no network: every machine that runs Python has the sources of its standard library.
"""

import json
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainstack.storage import files, manifest
from trainstack.storage.layout import DEMO, dataset_folder, model_folder

VOCAB_SIZE = 2048
END_TOKEN = "<|endoftext|>"
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,  # about hidden_size ** -0.5; 0.02 learns more slowly
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "float32",
}


def make_dataset(home: Path) -> None:
    """Write datasets/demo/train.jsonl: one document per source file of the standard library."""
    lines = [json.dumps({"path": name, "text": text}) for name, text in sources()]
    content = {"train.jsonl": ("\n".join(lines) + "\n").encode()}
    _publish(dataset_folder(home, DEMO, None), content, kind="dataset", documents=len(lines))


def sources() -> Iterator[tuple[str, str]]:
    """Path and text of every source file of the standard library, without its tests, in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT.isdisjoint(relative.parts):
            try:
                yield str(relative), path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # a few files of the library test other encodings


def make_model(home: Path) -> None:
    """Write models/demo: the architecture and a tokenizer trained on the demo's data."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in sources()), trainer)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TOKEN,
        "bos_token": END_TOKEN,
        "model_max_length": MODEL_CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    content = {
        "config.json": json.dumps(MODEL_CONFIG, indent=1).encode(),
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=1).encode(),
    }
    _publish(model_folder(home, DEMO), content, kind="model", weight_bytes=0)


def is_current(folder: Path) -> bool:
    """Whether models/demo or datasets/demo is whole, and the model that of this code."""
    config = folder / "config.json"
    return manifest.is_whole(folder) and files.read_object(config) in ({}, MODEL_CONFIG)


def _publish(final: Path, content: dict[str, bytes], **facts: Any) -> None:
    """Replace a folder by one with these files, as a download would leave it."""
    temporary = final.with_name(f".{final.name}.{time.time_ns()}.tmp")
    temporary.mkdir(parents=True)
    entries = {name: files.write_file(temporary / name, data) for name, data in content.items()}
    manifest.remove_folder(final)
    manifest.publish_folder(
        temporary, final, entries, name=DEMO, source=DEMO, revision=None, commit=None, **facts
    )
