"""A causal LM of transformers: built from a folder, named, and as a checkpoint stores it.

Its settings name special tokens. The tokenizer has files of its own, and may have taken another's
place: what they name may be a word to it.
"""

import contextlib
import copy
import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from trainstack.adapter import lora
from trainstack.chat.template import load_tokenizer
from trainstack.checkpoint.snapshot import CONFIG, ENDS, GENERATION, tokens_in
from trainstack.config.schema import AdapterSection, Config, ModelSection
from trainstack.errors import ConfigError, first_words
from trainstack.hub.weights import INDEX, WEIGHTS, shapes_of, shards_of
from trainstack.storage.files import read_object

log = logging.getLogger("trainstack")
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
GENERATES = re.compile(r"CausalLM|LMHead|ConditionalGeneration")
NO_TOKEN = "no token"
DIGITS = re.compile(r"\d+")
A_TABLE = re.compile(
    r"inv_freq$|attn\.(masked_)?bias$|attention\.(masked_)?bias$|relative_position_"
)
FURTHER = re.compile(r"nextn|mtp")  # settings of the layers that predict tokens after the next one


def read_config(folder: Path) -> Any:
    """The configuration of a model as transformers reads it; no code of others is run."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the class of that configuration raises
        kind = str(read_object(folder / CONFIG).get("model_type") or "")
        problem, fix = f"cannot read its config.json ({first_words(error)})", "correct it"
        if kind and kind not in CONFIG_MAPPING:
            problem = f"does not know its model_type {kind}"
            fix = "if it is newer, set a newer transformers in requirements.txt"
            near = difflib.get_close_matches(kind.lower(), CONFIG_MAPPING, 1)
            if near and DIGITS.findall(kind) == DIGITS.findall(near[0]):  # else another generation
                fix = f'write "model_type": "{near[0]}" in its config.json'
        raise ConfigError(
            f"transformers {transformers.__version__} {problem}; {fix}, or choose another model"
        ) from None


def check_kind(real: Any, init: str) -> None:
    """ConfigError if this is no decoder-only language model, or its weights cannot be trained."""
    names = real.architectures or []
    names = [names] if isinstance(names, str) else names
    named = " ".join([real.model_type, *(f"({name})" for name in names)])
    other = [name for name in names if not generates(name, real, init)]
    problem, fix = None, "choose a causal LM such as Llama or Qwen"
    if real.is_encoder_decoder:
        problem = "is an encoder-decoder model, and only decoder-only ones are trained here"
    elif type(real) not in AutoModelForCausalLM._model_mapping:
        problem = "is no causal LM: transformers has none for it"
        if real.sub_configs:
            problem = "is made of several parts, and transformers has no causal LM of its text part"
            fix = "choose the text-only model that it was made from"
    elif other:
        problem = f"is no causal LM: {other[0]} has another head, or none"
        fix = "choose the model that it was made from"
        if init == "scratch":
            own = AutoModelForCausalLM._model_mapping[type(real)].__name__
            fix = f'write "architectures": ["{own}"] in its config.json'
    elif init == "pretrained" and quantisation(real):
        problem = f"has quantised weights ({quantisation(real)}), which cannot be trained"
        fix = "name a repository that has them in bf16 or fp32"
    if problem:
        raise ConfigError(f"{named} {problem}; {fix}")


def generates(architecture: str, real: Any, init: str) -> bool:
    """Whether a class that a config.json names is a language model, or one without its head."""
    known = getattr(transformers, architecture, None)
    if known is None:
        return bool(GENERATES.search(architecture))
    is_bare = architecture == type(real).__name__.replace("Config", "Model")
    has_head = init == "scratch" or getattr(real, "tie_word_embeddings", False)
    return (is_bare and has_head) or issubclass(known, transformers.GenerationMixin)


def build_model(config: Config, newest: Path | None, model_folder: Path) -> nn.Module:
    """The model with its weights: of the checkpoint, perhaps an adapter's, else of its folder."""
    is_adapted = config.adapter.type is not None
    init = "pretrained" if newest else config.model.init
    causal_lm = build_causal_lm(
        model_folder if is_adapted else newest or model_folder,
        init, config.model, config.train.precision, config.run.seed, config.adapter,
    )  # fmt: skip
    if is_adapted:
        lora.tell_rest(causal_lm)
        lora.name_base(causal_lm, config.model.name, model_folder)
        if newest:
            lora.load_adapter(causal_lm, newest)
    return causal_lm


def build_causal_lm(
    folder: Path,
    init: str,
    section: ModelSection,
    precision: str,
    seed: int,
    adapter: AdapterSection | None = None,
) -> nn.Module:
    """The model from a folder: ``scratch`` draws new weights from the seed, else it reads them.

    Master weights are fp32 (fp64 in fp64): transformers 5 would load a bf16 file as bf16, and
    AdamW would then round away small updates. With an ``adapter``, whose matrices are new, nothing
    else is updated: the weights are in the precision. ConfigError if the weights do not fit.
    """
    is_adapted = adapter is not None and adapter.type is not None
    dtype = DTYPES[precision] if is_adapted or precision == "fp64" else torch.float32
    if seed >= 2**32:  # torch takes the low 32 bits
        seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    attention = section.attn_implementation  # transformers takes None for the best that it has
    arguments = {"dtype": dtype, "attn_implementation": None if attention == "auto" else attention}
    if precision == "fp64":
        arguments["experts_implementation"] = "eager"  # torch's grouped products know no fp64
    if init == "scratch":
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if quantisation(config):  # a checkpoint would be taken for a quantised one
            del config.quantization_config
        causal_lm = AutoModelForCausalLM.from_config(config, **arguments)
    else:
        causal_lm, found = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told by check_found, in one line
            output_loading_info=True,
            **arguments,
        )
        check_found(found, f"the weights in {folder}")
    if is_adapted:
        lora.add_adapter(causal_lm, adapter, seed)
    return causal_lm


def check_weights(folder: Path, whole: nn.Module) -> list[str]:
    """Lines on what is odd about the weights in ``folder``; ConfigError if they do not fit.

    transformers loads them as in a run, into a model like ``whole``, but into tensors that have
    shapes and no memory: it knows the names of earlier releases, and what it makes of experts.
    """
    notes = []
    check_generation_config(folder)
    files = [WEIGHTS] if (folder / WEIGHTS).exists() else shards_of(folder / INDEX)
    shapes = {name: shape for n in files for name, shape in shapes_of(folder / n).items()}
    one_by_one = mock.patch.dict("os.environ", HF_DEACTIVATE_ASYNC_LOAD="1")  # modes are per thread
    with FakeTensorMode(allow_non_fake_inputs=True), one_by_one:
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
        for target, source in getattr(whole, "all_tied_weights_keys", {}).items():
            if {target, source} <= {*weights}:  # their values would be compared
                del weights[target]
                notes.append(
                    f"its config.json says that {target} is {source}, but its weights have both; "
                    "where they differ, each is trained by itself"
                )
        try:
            _, found = type(whole).from_pretrained(
                None,
                config=copy.deepcopy(whole.config),
                state_dict=weights,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # of a model's code that wants values
            return [*notes, f"the shapes of its weights could not be tried ({first_words(error)})"]
    check_found(found)
    if unused := sorted({*found["unexpected_keys"], *passed_over(weights, whole)}):
        settings = whole.config.get_text_config().to_dict().items()
        further = [
            f"{k}={v}" for k, v in settings if FURTHER.search(k) and isinstance(v, int) and v
        ]
        notes.append(
            f"{len(unused)} of the {len(weights)} tensors of its weights are not used, such as "
            f"{unused[0]}; the checkpoints do not have them"
            + (f", though their config.json says {', '.join(further)}" if further else "")
        )
    return notes


def check_generation_config(folder: Path) -> None:
    """ConfigError if its generation_config.json cannot be read, as loading the weights does."""
    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        pass  # there is none
    except Exception as error:
        raise ConfigError(
            f"transformers cannot read its {GENERATION} ({first_words(error)}); correct it, or "
            "remove it"
        ) from None


def passed_over(weights: Iterable[str], whole: nn.Module) -> list[str]:
    """The weights that transformers leaves out without a word: layers of more, parts for images.

    Not the masks and tables that earlier releases kept among the weights.
    """
    patterns, known = whole._keys_to_ignore_on_load_unexpected or (), [*whole.state_dict()]
    return [
        name
        for name in weights
        if any(re.search(pattern, name) for pattern in patterns)
        and not A_TABLE.search(name)
        and not any(f".{key}".endswith(f".{name}") for key in known)
    ]


def check_found(found: dict[str, Any], weights: str = "its weights") -> None:
    """ConfigError if transformers, as it tells after loading, had to make weights up."""
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if found["mismatched_keys"]:
        name, has, wanted = min(found["mismatched_keys"])
        raise ConfigError(
            f"{weights} have {name} of shape {[*has]}, and config.json asks for {[*wanted]}; "
            "correct config.json, or choose another model"
        )
    if not missing:
        return
    problem = f"{weights} have no {missing[0]}, which would be new and random"
    if len(missing) > 1:
        problem += f", nor {len(missing) - 1} more"
    fix = "they are not those of config.json: correct it, or choose another model"
    if renamed := [name for name in missing if unused and unused[0].endswith(f".{name}")]:
        prefix = unused[0].removesuffix(renamed[0])
        fix = f"they have {unused[0]}: save them again without {prefix} in front of each name"
    raise ConfigError(f"{problem}; {fix}")


def quantisation(config: Any) -> str | None:
    """The method by which the weights that belong to a configuration are quantised, if they are."""
    found = getattr(config, "quantization_config", None)
    found = found if isinstance(found, dict) or not found else found.to_dict()
    return str(found.get("quant_method", "bitsandbytes")) if found else None


def count_parameters(causal_lm: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in causal_lm.parameters())


def saved_weights(causal_lm: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's safetensors file, under the names of its format.

    Tied tensors once, as save_pretrained does; renamed back if transformers 5 converted names at
    loading.
    """
    if adapter := lora.adapter_weights(causal_lm):
        return adapter
    seen, weights = set(), {}
    for name, tensor in causal_lm.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            weights[name] = tensor.detach()
    return revert_weight_conversion(causal_lm, weights)


def special_tokens(
    causal_lm: nn.Module, model_folder: Path, learned: Sequence[int]
) -> tuple[list[int], set[int]]:
    """Where a model stops when it generates, and the ids that its settings do not mean.

    It stops at its own ends, then at those that are ``learned``. What of its settings is a word of
    the tokenizer, or no token, is left out, which is logged.
    """
    named, odd = tokens_in(settings_of(causal_lm)), {}
    if unknown := {number for ids in named.values() for number in ids} - {*learned}:
        odd = words(load_tokenizer(model_folder), unknown)
    if odd:
        log.warning("model: %s; the checkpoints leave that out", named_as(named, odd))
    own = (number for number in named.get(ENDS, ()) if number not in odd)
    return list(dict.fromkeys([*own, *learned])), {*odd}


def settings_of(causal_lm: nn.Module) -> dict[str, Any]:
    """What a model does when it generates."""
    is_able = causal_lm.can_generate()
    return (causal_lm.generation_config if is_able else causal_lm.config).to_dict()


def words(tokenizer: Any, ids: set[int]) -> dict[int, str]:
    """Those ids that are no special tokens of the tokenizer, with what they are to it."""
    odd = sorted(ids - tokenizer.added_tokens_decoder.keys())
    known = range(len(tokenizer))
    return {n: repr(tokenizer.decode([n])) if n in known else NO_TOKEN for n in odd}


def named_as(named: dict[str, list[int]], odd: dict[int, str]) -> str:
    """The special tokens of a model's settings that are none, with what they are."""
    found = [f"{key} {n:,}, which is {odd[n]}" for key in named for n in named[key] if n in odd]
    return f"its settings name as {' and as '.join(found)} to its tokenizer"


def notes_on(causal_lm: nn.Module, model_folder: Path) -> list[str]:
    """Lines on tokens that are others to its tokenizer; nothing if that cannot be loaded."""
    named, notes = tokens_in(settings_of(causal_lm)), []
    for key, ids in tokens_in(read_object(model_folder / GENERATION)).items():
        named[key] = list(dict.fromkeys([*named.get(key, ()), *ids]))
    embedding = causal_lm.get_input_embeddings()
    row = getattr(embedding, "padding_idx", None) if embedding.weight.requires_grad else None
    with contextlib.suppress(ConfigError):  # preparing the data says it
        tokenizer = load_tokenizer(model_folder)
        odd = words(tokenizer, {number for ids in named.values() for number in ids})
        is_used = row in named.get(ENDS, ()) or odd.get(row, NO_TOKEN) != NO_TOKEN
        if row is not None and is_used:
            notes.append(
                f"its pad_token_id={row} stands in texts, and torch gives that row of its "
                "embedding no gradient; take pad_token_id out of its config.json"
            )
        if odd:
            notes.append(f"{named_as(named, odd)}; its checkpoints will leave that out")
    return notes
