"""LoRA (Hu et al., arXiv 2106.09685) by peft: the model stays, small matrices beside it learn."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainstack.adapter.base import named_base
from trainstack.checkpoint.snapshot import ADAPTER_NAME
from trainstack.config.schema import AdapterSection
from trainstack.errors import ConfigError, first_words
from trainstack.storage.layout import ADAPTER_WEIGHTS

log = logging.getLogger("trainstack")
PREFIX = "base_model.model."  # of the names in peft's files


def add_adapter(causal_lm: nn.Module, section: AdapterSection, seed: int) -> None:
    """Freeze a model, and put new matrices beside its layers; it keeps its class.

    They are drawn from the seed, and are fp32, or fp64 beside fp64. ConfigError if target_modules
    has a name that no linear layer has, or if peft does not take the model.
    """
    from peft import LoraConfig, inject_adapter_in_model  # seconds, for an adapter alone

    from trainstack.adapter.layer import quicken

    targets = section.target_modules
    if targets != "all-linear":
        check_names(causal_lm, targets)
    made = LoraConfig(
        r=section.r, lora_alpha=section.alpha, lora_dropout=section.dropout,
        target_modules=targets, task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what peft does with GPT-2's layers by itself
            inject_adapter_in_model(made, causal_lm, ADAPTER_NAME)
    except Exception as error:  # whatever peft raises
        raise ConfigError(
            f"adapter.type=lora: peft does not take this model ({first_words(error)}); name other "
            "layers in adapter.target_modules, or write adapter.type=null"
        ) from None
    made.target_modules, made.inference_mode = sorted(made.target_modules), True  # in its file
    causal_lm.requires_grad_(False)
    quicken(causal_lm)
    for _, parameter in adapter_of(causal_lm):
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(True)


def check_names(causal_lm: nn.Module, targets: list[str]) -> None:
    """ConfigError if a name is that of no linear layer, or of the head alone."""
    head = causal_lm.get_output_embeddings()
    linear = [
        name
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ConfigError(
                f"adapter.target_modules: no linear layer is named {target}; it has {known}"
            )


def of_any_layer(section: AdapterSection) -> AdapterSection:
    """The same in a copy of fewer layers, where a name such as layers.11.q_proj has no layer."""
    if section.target_modules == "all-linear":
        return section
    ends = [name.rpartition(".")[2] for name in section.target_modules]
    return section.model_copy(update={"target_modules": ends})


def tell_rest(causal_lm: nn.Module) -> None:
    """A line on the large weights that are no linear layers, as those of fused experts."""
    parameters = [*causal_lm.parameters()]
    rest = sum(p.numel() for p in parameters if p.dim() > 2) / sum(p.numel() for p in parameters)
    if rest:
        log.info("model: %.2g%% of its weights are no linear layers, such as experts in one tensor "
                 "or convolutions: they get no adapter", 100 * rest)  # fmt: skip


def adapter_of(causal_lm: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapter's parameters, with the names that they have in the model; none without one."""
    mark = f".{ADAPTER_NAME}."
    if hasattr(causal_lm, "peft_config"):
        yield from ((name, p) for name, p in causal_lm.named_parameters() if mark in name)


def saved_parameters(causal_lm: nn.Module) -> list[nn.Parameter]:
    """What a checkpoint holds: of a model with an adapter, the adapter alone."""
    return [p for _, p in adapter_of(causal_lm)] or [*causal_lm.parameters()]


def count_saved(causal_lm: nn.Module) -> int:
    """Parameters that a checkpoint holds."""
    return sum(p.numel() for p in saved_parameters(causal_lm))


def adapter_weights(causal_lm: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of adapter_model.safetensors, under the names of peft; empty without one."""
    return {
        PREFIX + n.replace(f".{ADAPTER_NAME}.", "."): p.detach() for n, p in adapter_of(causal_lm)
    }


@torch.no_grad()
def load_adapter(causal_lm: nn.Module, checkpoint: Path) -> None:
    """Put the matrices of a checkpoint in the place of the new ones."""
    saved = load_file(checkpoint / ADAPTER_WEIGHTS)
    for name, tensor in adapter_weights(causal_lm).items():
        tensor.copy_(saved[name])


def name_base(causal_lm: nn.Module, name: str, folder: Path) -> None:
    """Let adapter_config.json say which model the adapter belongs to."""
    for key, value in named_base(name, folder).items():
        setattr(causal_lm.peft_config[ADAPTER_NAME], key, value)
