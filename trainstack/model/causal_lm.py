"""A causal LM of transformers: built from a folder, named, and as a checkpoint stores it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from trainstack.config.schema import ModelSection
from trainstack.errors import ConfigError


def build_causal_lm(
    folder: Path, init: str, section: ModelSection, precision: str, seed: int
) -> nn.Module:
    """The model from a folder: ``scratch`` draws new weights from the seed, else it reads them.

    Master weights are fp32 (fp64 in fp64): transformers 5 would load a bf16 file as bf16, and
    AdamW would then round away small updates.
    """
    dtype = torch.float64 if precision == "fp64" else torch.float32
    attention = section.attn_implementation  # transformers takes None for the best that it has
    arguments = {"dtype": dtype, "attn_implementation": None if attention == "auto" else attention}
    if precision == "fp64":
        arguments["experts_implementation"] = "eager"  # torch's grouped products know no fp64
    if init == "scratch":
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if quantisation(config):  # a checkpoint would be taken for a quantised one
            del config.quantization_config
        return AutoModelForCausalLM.from_config(config, **arguments)
    causal_lm, found = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **arguments
    )
    if found["missing_keys"]:
        raise ConfigError(
            f"{folder}: its weights have no {min(found['missing_keys'])}, which would be new and "
            "random; they are those of another kind of model, choose another model.name"
        )
    return causal_lm


def quantisation(config: Any) -> str | None:
    """The method by which the weights that belong to a configuration are quantised, if they are."""
    found = getattr(config, "quantization_config", None)
    found = found if isinstance(found, dict) or not found else found.to_dict()
    return str(found.get("quant_method", "bitsandbytes")) if found else None


def count_parameters(causal_lm: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in causal_lm.parameters())


def saved_weights(causal_lm: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint's model.safetensors holds, under the names of its format.

    Tied tensors once, as save_pretrained does; renamed back if transformers 5 converted names at
    loading.
    """
    seen, weights = set(), {}
    for name, tensor in causal_lm.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            weights[name] = tensor.detach()
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5 names were not converted
        return weights
    return revert_weight_conversion(causal_lm, weights)


def describe(causal_lm: nn.Module, init: str) -> str:
    """For people: architecture, size, where its weights came from."""
    name = type(causal_lm).__name__.removesuffix("ForCausalLM")
    origin = "from scratch" if init == "scratch" else "pretrained"
    return f"{name} {count_parameters(causal_lm) / 1e6:.1f}M {origin}"
