"""``python -m trainstack prove``: can the model be trained as configured? Known before the queue.

What was found once is kept in the project's cache, under a name that says all it depends on. So
submit.sh answers in a blink, and neither torch nor transformers is loaded; only what is not there
yet is tried (rehearsal.py), which takes some seconds.
"""

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from trainstack.config.load import load
from trainstack.config.schema import Config
from trainstack.data.store import is_of_weights
from trainstack.errors import ConfigError
from trainstack.options import parse, parser_of
from trainstack.storage import files, layout, manifest

PACKAGE = Path(__file__).parent.parent
ROOMS = (PACKAGE / "adapter", PACKAGE / "model")  # whose code decides too


def main(arguments: list[str]) -> int:
    parser = parser_of("prove", __doc__, has_config=True)
    options = parse(parser, arguments)
    config = load(options.config, options.overrides)
    folder = layout.model_folder(options.home, config.model.name)
    if config.model.name == layout.DEMO and config.model.init == "pretrained":
        raise ConfigError("model demo has no weights; set model.init=scratch")
    if config.model.name != layout.DEMO or folder.exists():  # else it is made later
        prove(options.home, config, folder, lambda text: print(f"prove: {text}", file=sys.stderr))
    return 0


def prove(home: Path, config: Config, folder: Path, say: Callable[[str], None]) -> int:
    """Say what is known of the model, tried now if need be.

    Returns how many parameters a checkpoint would hold.

    ``folder``: that holds the model. ConfigError if it cannot be trained as configured.
    """
    record = home / "cache" / "proofs" / f"{proof_key(folder, config)}.json"
    found = files.object_in(record)
    if not found:
        say(f"model {config.model.name}: a small copy of it is tried; that takes some seconds")
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the Hub's library is imported
        from trainstack.model.rehearsal import rehearse

        found = asdict(rehearse(folder, config))
        files.keep_found(record, found)
    for note in [*found["notes"], *unused_weights(folder, config)]:
        say(f"model {config.model.name}: {note}")
    return found["parameters"]


def proof_key(folder: Path, config: Config) -> str:
    """The name of all that the answer depends on: files, settings, versions, our own code."""
    known = manifest.read_manifest(folder)["files"].items()
    has_weights = config.model.init == "pretrained"
    depends_on = {
        "files": {name: entry for name, entry in known if has_weights or not is_of_weights(name)},
        "model": config.model.model_dump(exclude={"revision"}),
        "train": config.train.model_dump(include={"precision", "activation_checkpointing"}),
        "data": config.data.model_dump(include={"packing", "seq_len"}),
        "is_compiled": config.train.torch_compile,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "has_flash": importlib.util.find_spec("flash_attn") is not None,
        "code": {
            f"{room.name}/{path.name}": manifest.hash_file(path)
            for room in ROOMS
            for path in room.glob("*.py")
        },
    }
    if config.adapter.type:
        depends_on["adapter"] = {**config.adapter.model_dump(), "peft": version("peft")}
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]


def unused_weights(folder: Path, config: Config) -> list[str]:
    """A line if the model has weights that a run from scratch does not use."""
    known = manifest.read_manifest(folder)
    has_weights = known.get("weight_bytes") or known.get("has_weights")
    if config.model.init != "scratch" or not has_weights:
        return []
    return ["its pretrained weights are not used; to use them: model.init=pretrained"]
