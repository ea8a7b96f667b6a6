"""Each recipe trains as it is written, but for its size: the model, the data and the steps."""

import json
import random
import shutil

import pytest
import transformers
from records import TEMPLATE, record

import tiny
from trainstack.config.load import load
from trainstack.run.folder import RunFolder
from trainstack.storage import layout, manifest

RECIPES = sorted((tiny.ROOT / "recipes").glob("*.yaml"))
SMALL = [
    "data.seq_len=32", "train.global_batch_size=4", "train.micro_batch_size=2",
    "train.max_steps=2", "train.num_train_epochs=1", "train.precision=fp32",
    "train.torch_compile=false",
    "model.attn_implementation=auto", "eval.eval_samples=4", "eval.sample_tokens=4",
    "log.logging_steps=1", "log.report_to=[]",
]  # fmt: skip


def make_model(home, name: str) -> None:
    """A tiny Llama with a chat template and weights, under the recipe's name."""
    made = tiny.make_model(home / "made", "tiny", TEMPLATE)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(made)
    )
    model.save_pretrained(made)
    (made / "manifest.json").unlink()
    folder = layout.model_folder(home, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    entries = {path.name: manifest.hash_file(path) for path in made.iterdir()}
    size = (made / "model.safetensors").stat().st_size
    manifest.publish_folder(
        made, folder, entries, source="test", revision=None, kind="model", weight_bytes=size
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_trains_on_its_kind_of_data(recipe, tmp_path):
    config, generator = load(recipe, []), random.Random(1)
    kind = "messages" if config.data.format == "auto" else config.data.format
    make_model(tmp_path, config.model.name)
    splits = [split for split in (config.data.split, config.data.eval_split) if split]
    content = {
        f"{split}.jsonl": "".join(json.dumps(record(kind, generator)) + "\n" for _ in range(200))
        for split in splits
    }
    folder = layout.dataset_folder(tmp_path, config.data.name, config.data.subset)
    folder.parent.mkdir(parents=True, exist_ok=True)
    named = {split: [f"{split}.jsonl"] for split in splits}
    tiny.publish(folder, content, kind="dataset", splits=named)
    shutil.copy(recipe, tmp_path / "config.yaml")
    fraction = [f"data.eval_fraction={0 if config.data.eval_split else 0.1}"]
    where = ("--home", tmp_path, "--config", tmp_path / "config.yaml")
    tiny.run_command("prepare", *where, *SMALL, *fraction)
    said = tiny.train(tmp_path, 1, *SMALL, *fraction).stdout
    run = RunFolder(tmp_path / "runs" / recipe.stem)
    assert run.status()["state"] == "DONE", said
    assert sorted(tiny.metrics(tmp_path, recipe.stem)) == [1, 2]
    assert 2 in tiny.metrics(tmp_path, recipe.stem, "eval_loss"), "something is held out"
    assert ("from scratch" in said) == (config.model.init == "scratch")
    assert "is not used" not in said
