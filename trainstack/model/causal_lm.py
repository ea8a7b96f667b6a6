"""A causal LM of transformers: built from a folder, named, and as a checkpoint stores it."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from trainstack.config.schema import ModelSection


def build_causal_lm(
    folder: Path, init: str, section: ModelSection, precision: str, seed: int
) -> nn.Module:
    """The model from a folder: ``scratch`` draws new weights from the seed, else it reads them.

    Master weights are fp32 (fp64 in fp64): transformers 5 would load a bf16 file as bf16, and
    AdamW would then round away small updates.
    """
    dtype = torch.float64 if precision == "fp64" else torch.float32
    arguments = {"dtype": dtype, "attn_implementation": section.attn_implementation}
    if init == "scratch":
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return AutoModelForCausalLM.from_config(config, **arguments)
    return AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, **arguments
    )


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
