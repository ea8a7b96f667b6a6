"""The model of an export: loaded, merged, written, and compared with its checkpoint."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_state_dict_into_shards_factory
from torch import nn

from trainstack.adapter.base import check_base
from trainstack.checkpoint.snapshot import CONFIG, GENERATION, JSON_FILES
from trainstack.checkpoint.tensorfile import write_safetensors
from trainstack.config.schema import ModelSection
from trainstack.errors import ConfigError, Failed
from trainstack.export.card import Made
from trainstack.export.source import Source, Way
from trainstack.hub.choose import CARD
from trainstack.hub.weights import INDEX
from trainstack.model.causal_lm import DTYPES, build_causal_lm, count_parameters, saved_weights
from trainstack.model.trial import some_tokens
from trainstack.storage import files, layout
from trainstack.storage.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS

MOST_TOKENS = 512  # on which logits are compared
MERGED, EQUAL = 1e-4, 1e-6  # of the largest logit: how far those of a merged and a copied one are


def write_model(
    source: Source, folder: Path, way: Way, say: Callable[[str], None]
) -> tuple[dict[str, dict[str, Any]], Made]:
    """Write all but the card; Failed if what was written is another model.

    Whoever loads it gets the checkpoint's values, rounded to the type. So it is loaded again, and
    has to say to the last bit what those rounded values say.
    """
    if source.is_adapter:
        if source.model_folder is None:
            raise ConfigError("the adapter's model is in a project; name that with --home")
        name = source.state.settings["model"]["name"]
        check_base(source.state.identity, source.model_folder, name)
    entries, model = {}, load(source, source.checkpoint)
    ids = some_tokens(model, min(MOST_TOKENS, source.state.identity["data.seq_len"]))
    due = logits_of(model, ids)
    del model
    model = load(source, source.checkpoint)  # again: RWKV changes its weights when it is asked
    architecture = type(model.get_base_model() if source.is_adapter else model).__name__
    model = merged(model, due, ids, say) if way.is_merged else model
    parameters = count_parameters(model)
    if source.is_adapter and not way.is_merged:
        content = (source.checkpoint / ADAPTER_WEIGHTS).read_bytes()
        entries[ADAPTER_WEIGHTS] = files.write_file(folder / ADAPTER_WEIGHTS, content)
    else:
        round_to(model, DTYPES[way.dtype])
        tensors = saved_weights(model)
        size = sum(tensor.nbytes for tensor in tensors.values())
        files.check_space(folder.parent, size, move="name another --to")
        entries |= write_weights(folder, tensors, way.shard_bytes)
        del tensors
        due = logits_of(model.float(), ids)
    del model
    for name, content in small_files(source, way).items():
        files.make_folder((folder / name).parent)
        entries[name] = files.write_file(folder / name, content)
    found = logits_of(load(source, folder, way.is_merged), ids)
    if (far := distance(found, due)) > EQUAL:
        raise Failed(f"what was written says something else than the checkpoint: its logits differ "
                     f"by {far:.1e}; nothing is left of it")  # fmt: skip
    rounded = "" if way.dtype == "fp32" else f", rounded to {way.dtype}"
    near = "bit for bit" if far == 0 else f"to {far:.1e}"
    say(f"loaded again, its logits are those of {source.checkpoint.name}{rounded}, {near}")
    return entries, Made(architecture, parameters, way.dtype, way.is_merged, [*entries])


def round_to(causal_lm: nn.Module, dtype: torch.dtype) -> None:
    """Give parameters that type, but for those that transformers keeps in fp32 when it loads them.

    ConfigError for values that it does not have.
    """
    kept = [*causal_lm._get_dtype_plan(dtype)]
    for name, parameter in causal_lm.named_parameters():
        if any(part in name for part in kept):
            continue
        rounded = parameter.data.to(dtype)
        if not torch.isfinite(rounded).all():
            fix = "write --dtype bf16" if torch.isfinite(parameter).all() else "choose another step"
            raise ConfigError(f"{name} has values beyond {dtype}; {fix}")
        parameter.data = rounded


def write_weights(
    folder: Path, weights: dict[str, torch.Tensor], most_bytes: int
) -> dict[str, dict[str, Any]]:
    """The manifest entries of one file, or of shards and their index, as from_pretrained reads."""
    split = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=most_bytes,
    )
    entries = {
        file: write_safetensors(folder / file, {name: weights[name] for name in names})
        for file, names in split.filename_to_tensors.items()
    }
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        entries[INDEX] = files.write_file(folder / INDEX, json.dumps(index, indent=2).encode())
    return entries


def small_files(source: Source, way: Way) -> dict[str, bytes]:
    """What stands beside the weights, by name: as the checkpoint has it, without places here."""
    found = {}
    if way.is_merged:  # what the adapter does not say of its model
        for name in (CONFIG, GENERATION):
            if (path := source.model_folder / name).exists():
                found[name] = path.read_bytes()
    for name in source.entries:
        if not name.endswith((".safetensors", ".safetensors.index.json")):
            found[name] = (source.checkpoint / name).read_bytes()
    for name in (CARD, *([ADAPTER_CONFIG] if way.is_merged else [])):
        found.pop(name, None)
    for name in {*JSON_FILES} & found.keys():
        found[name] = for_others(name, found[name], way.dtype)
    return found


def for_others(name: str, content: bytes, dtype: str) -> bytes:
    """A file of settings as it is right elsewhere: the new type, and no path of this machine."""
    before = json.loads(content)
    settings = {
        key: value
        for key, value in before.items()
        if key not in ("_name_or_path", "name_or_path") or not layout.is_local(str(value))
    }
    if name == CONFIG:
        settings.pop("torch_dtype", None)  # the name before transformers 5
        settings["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    if settings == before:
        return content
    return (json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def load(source: Source, folder: Path, is_merged: bool = False) -> nn.Module:
    """The model in fp32 from the checkpoint or its export, with its adapter if it has one.

    ``is_merged``: the adapter is within.
    """
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    settings = source.state.settings
    section = ModelSection(**{**settings["model"], "attn_implementation": "auto"})
    if is_merged or not source.is_adapter:
        return build_causal_lm(folder, "pretrained", section, "fp32", 0)
    from peft import PeftModel  # a second, for nothing without an adapter

    warnings.filterwarnings("ignore", category=FutureWarning)  # peft asks transformers by old names
    base, seed = source.model_folder, settings["run"]["seed"]
    causal_lm = build_causal_lm(base, section.init, section, "fp32", seed)
    return PeftModel.from_pretrained(causal_lm, folder, local_files_only=True)


@torch.no_grad()
def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary]"""
    return model.eval()(input_ids=ids, use_cache=False).logits[0].float()


def merged(
    model: nn.Module, expected: torch.Tensor, ids: torch.Tensor, say: Callable[[str], None]
) -> nn.Module:
    """The model that takes its adapter in; Failed if it then says something else."""
    whole = model.merge_and_unload(safe_merge=True)
    if (far := distance(logits_of(whole, ids), expected)) > MERGED:
        raise Failed(f"merged, the model is another one: its logits differ by {far:.1e}; "
                     "export the adapter alone, without --merge")  # fmt: skip
    say(f"merged, its logits are within {far:.1e} of those with the adapter beside it")
    return whole


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits, as a share of the largest logit."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9)).item()
