"""The tokenizer of a model folder, without transformers, and whether it fits the model."""

import json
from pathlib import Path
from typing import Any

from trainstack.errors import ConfigError
from trainstack.storage import layout


def load_tokenizer(model_folder: Path) -> tuple[Any, int]:
    """The tokenizer of a model folder without transformers (4 s), and the id of its end token."""
    path = model_folder / "tokenizer.json"
    if path.exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    else:  # a sentencepiece model: transformers converts it
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
        tokenizer = tokenizer.backend_tokenizer
    end = _read_json(model_folder / "tokenizer_config.json").get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    end_id = tokenizer.token_to_id(end) if end else None
    if end_id is None:
        end_id = _read_json(model_folder / "config.json").get("eos_token_id")
        end_id = end_id[0] if isinstance(end_id, list) else end_id
    if end_id is None:
        raise ConfigError(
            f"{model_folder}: its tokenizer has no end token, so documents cannot be joined; "
            "name one as eos_token in its tokenizer_config.json"
        )
    return tokenizer, end_id


def check_vocabulary(home: Path, model_name: str, tokens_known: int) -> None:
    """ConfigError where a token id of the tokenizer would lie beyond the model's embedding."""
    vocab_size = model_vocabulary(layout.model_folder(home, model_name))
    if tokens_known > vocab_size:
        raise ConfigError(
            f"{model_name}: its tokenizer has {tokens_known:,} tokens, its "
            f"model only {vocab_size:,}; they do not belong together, choose another model.name"
        )


def model_vocabulary(model_folder: Path) -> int:
    """Rows of the model's embedding, from its config.json."""
    config = _read_json(model_folder / "config.json")
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not size:
        raise ConfigError(f"{model_folder}/config.json: no vocab_size; is it a language model?")
    return size


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}
