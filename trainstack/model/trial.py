"""What a model's own code makes of a few tokens, tried before the first step."""

import bisect
import contextlib
import inspect
import logging
import re
from collections.abc import Iterator

import torch
from torch import nn

from trainstack.config.batch import IGNORED_LABEL
from trainstack.errors import ConfigError, first_words

log = logging.getLogger("trainstack")
TOKENS, NEW_TOKENS = 16, 4
MOST_TOKENS = 4096  # of a sequence that is tried whole
LIMITS = ("max_position_embeddings", "max_seq_len", "context_length")  # names of config.json
LOGIT = 4096.0  # in the trial of a head: beyond every cap, and exact in bf16 and fp16
BALANCING = re.compile(r"aux_loss_(coef|alpha)|moe_loss_weight")  # settings of experts
ROUTER = re.compile(r"\b(router|gate|wg)\b.*weight$")  # of experts
FAULTS = (AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError)


@contextlib.contextmanager
def trying(causal_lm: nn.Module, is_training: bool = False) -> Iterator[None]:
    """Within it the model is in that mode; what its code raises becomes a ConfigError.

    On a GPU a RuntimeError stays what it is: it may be the device's.
    """
    was_training = causal_lm.training
    causal_lm.train(is_training)
    is_cpu = next(causal_lm.parameters()).device.type == "cpu"
    faults = (*FAULTS, RuntimeError) if is_cpu else FAULTS
    try:
        yield
    except faults as error:
        if "allocate memory" in str(error):
            raise
        raise ConfigError(
            f"{type(causal_lm).__name__} fails on {TOKENS} tokens of text ({first_words(error)}); "
            "choose another model"
        ) from error
    finally:
        causal_lm.train(was_training)


@contextlib.contextmanager
def in_full_precision(causal_lm: nn.Module) -> Iterator[None]:
    """Within it there is no autocast, and weights of 16 bits are fp32 while their module runs.

    So rounding neither hides nor shows a thing; and no more than a module takes twice the memory.
    """
    kept, hooks = {}, []

    def widen(module: nn.Module, _inputs: tuple) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                kept[parameter], parameter.data = parameter.data, parameter.data.float()

    def narrow(module: nn.Module, _inputs: tuple, _output: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = kept.pop(parameter, parameter.data)

    for module in causal_lm.modules():
        hooks.append(module.register_forward_pre_hook(widen))
        hooks.append(module.register_forward_hook(narrow, always_call=True))
    try:
        with torch.autocast(next(causal_lm.parameters()).device.type, enabled=False):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def some_tokens(causal_lm: nn.Module, number: int) -> torch.Tensor:
    """Token ids, int64 [1, number]; small ones, since large ones may stand for images."""
    weight = causal_lm.get_input_embeddings().weight
    return torch.arange(number, device=weight.device).remainder(min(64, len(weight))).unsqueeze(0)


def has_plain_head(causal_lm: nn.Module) -> bool:
    """Whether the logits are the output embedding applied to the last hidden state, no more.

    Some models scale, cap or mask their logits, or add to them; the chunked loss would be wrong
    there. Small weights would hide that. So in this trial the head gets hidden states, and a few
    rows of its weight values, that make logits of LOGIT and of zero: the answer is the
    architecture's, the same for all weights and at every resume.
    """
    head = causal_lm.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return False
    tokens, weight = some_tokens(causal_lm, min(8, *head.weight.shape)), head.weight.detach()
    rows, inputs = weight[: tokens.shape[1]], []
    kept, one_hot = rows.clone(), torch.zeros_like(rows).fill_diagonal_(LOGIT**0.5)

    def replace(_head: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        inputs.append(arguments[0])
        return (one_hot.to(arguments[0].dtype).expand(arguments[0].shape),)

    frozen = [p for p in causal_lm.parameters() if not p.requires_grad]  # beside an adapter
    try:
        rows.copy_(one_hot)
        for parameter in frozen:
            parameter.requires_grad_(True)
        body = causal_lm.base_model(input_ids=tokens, use_cache=False, return_dict=True)
        with head.register_forward_pre_hook(replace):
            logits = logits_of(causal_lm, tokens)
        expected = nn.functional.linear(one_hot, weight).to(logits.dtype)
        # A bias may still be zero: no parameter beside the weight has a part in the logits.
        others = [p for p in causal_lm.parameters() if p.requires_grad and p is not head.weight]
        parts = torch.autograd.grad(logits.sum(), others, allow_unused=True)
    finally:
        rows.copy_(kept)
        for parameter in frozen:
            parameter.requires_grad_(False)
    hidden = getattr(body, "last_hidden_state", None)
    if hidden is None or len(inputs) != 1 or any(part is not None for part in parts):
        return False
    # Kernels may differ by rounding; a factor of a model is far from 1.
    is_hidden = bool((inputs[0] - hidden).abs().max() <= 0.02 * hidden.abs().max())
    return is_hidden and torch.equal(logits[0], expected)


@torch.no_grad()
def check_own_loss(causal_lm: nn.Module, balancing: float) -> None:
    """ConfigError if the model's own loss is not the next-token loss and its balancing loss."""
    name, tokens = type(causal_lm).__name__, some_tokens(causal_lm, TOKENS)
    first_only = tokens.clone()
    first_only[:, 1:] = IGNORED_LABEL
    aimless, output = (
        causal_lm(input_ids=tokens, labels=labels, use_cache=False, return_dict=True)
        for labels in (first_only, tokens)
    )
    aimless, own = (o.loss - (balancing and balancing * o.aux_loss) for o in (aimless, output))
    if aimless > 0.01:  # nothing predicts the first token: a next-token loss is 0 or not a number
        raise ConfigError(
            f"{name} learns to name each token, not the next one: it is the decoder of an "
            "encoder-decoder model, or not made for text alone; choose another model"
        )
    ours = nn.functional.cross_entropy(output.logits[0, :-1].float(), tokens[0, 1:])
    if abs(own - ours) > 1e-4 * abs(own):
        raise ConfigError(
            f"the loss of {name} itself is {float(own):.4f} where the next-token loss is "
            f"{float(ours):.4f}: a part of it would be left out; switch that part off in its "
            "config.json, or choose another model"
        )


def balancing_of(causal_lm: nn.Module) -> float:
    """The coefficient of the experts' balancing loss; 0 if the configuration does not ask for it.

    Says what follows from a coefficient that is set.
    """
    config = causal_lm.config.get_text_config()
    settings = config.to_dict()
    settings |= settings.get("ffn_config") or {}  # of DBRX
    found = {key: value for key, value in settings.items() if BALANCING.search(key) and value}
    if not found:
        return 0.0
    (key, coefficient), *_ = found.items()
    is_known = "output_router_logits" in inspect.signature(causal_lm.forward).parameters
    is_on = is_known and config.output_router_logits
    effect = "losses are shown without the experts' balancing loss, which is learned too"
    if not is_known:
        effect = "is not used: transformers has no balancing loss for this model"
    elif not is_on:
        effect = "is not used; output_router_logits=true in the model's config.json would balance "
        effect += "its experts"
    log.info("model: %s=%s: %s", key, coefficient, effect)
    return float(coefficient) if is_on else 0.0


@torch.no_grad()
def idle_routers(causal_lm: nn.Module) -> list[str]:
    """A line if routers of experts choose, and weigh nothing: larger scores change no logits.

    Then they get no gradient from text, but for rounding. Changes their weights.
    """
    named = causal_lm.named_parameters()
    routers = {name: p for name, p in named if ROUTER.search(name)}
    if not routers:
        return []
    tokens = some_tokens(causal_lm, TOKENS)
    before = logits_of(causal_lm, tokens)
    for parameter in routers.values():
        parameter.mul_(1000)  # which are the largest stays as it is
    if (logits_of(causal_lm, tokens) - before).abs().max() > 1e-6 * before.abs().max():
        return []
    return [
        f"its router ({next(iter(routers))}) learns nothing from text: it chooses, and changes no "
        "weight, as where one expert per token has a weight of 1; in its config.json choose more "
        "experts per token, or norm_topk_prob: false"
    ]


def freeze_unreached(loss_model: nn.Module, seq_len: int) -> list[nn.Parameter]:
    """Freeze what gets no gradient from text; returns what gets one only from some text.

    DDP waits for the gradient of each parameter, and would end at its second step. Some text: what
    one token does not reach but ``seq_len`` do, and a list of experts of which it reaches a part.
    """
    causal_lm = loss_model.causal_lm
    short, long = (reached(loss_model, number) for number in (1, seq_len))
    partly: set[int] = set()
    for elements in causal_lm.modules():
        if isinstance(elements, nn.ModuleList):
            ids = [{id(p) for p in element.parameters()} for element in elements.children()]
            if len({bool(own & short) for own in ids if own}) == 2:
                partly.update(*ids)
    named = [(name, p) for name, p in causal_lm.named_parameters() if p.requires_grad]
    unreached = [(name, p) for name, p in named if id(p) not in short | long | partly]
    for _, parameter in unreached:
        parameter.requires_grad_(False)
    if unreached:
        log.info("model: %d of %d parameters get no gradient from text and stay as they are: %s%s",
                 len(unreached), len(named), unreached[0][0],
                 " and others" if len(unreached) > 1 else "")  # fmt: skip
    return [p for _, p in named if id(p) in partly | (long - short)]


def reached(loss_model: nn.Module, number: int) -> set[int]:
    """The ids of the parameters that get a gradient from so many tokens."""
    tokens = some_tokens(loss_model.causal_lm, number)
    loss_model(tokens, tokens).backward()
    found = {id(p) for p in loss_model.parameters() if p.grad is not None}
    loss_model.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def check_future(causal_lm: nn.Module) -> None:
    """ConfigError if what a token predicts depends on a token behind it."""
    tokens = some_tokens(causal_lm, TOKENS)
    other = tokens.clone()
    other[:, -1] = tokens[:, 0]
    before, after = (logits_of(causal_lm, inputs)[:, :-1] for inputs in (tokens, other))
    if (before - after).abs().max() > 1e-5 * before.abs().max():
        is_settable = getattr(causal_lm.config, "is_decoder", None) is False
        fix = 'write "is_decoder": true in its config.json, or ' if is_settable else ""
        raise ConfigError(
            f"{type(causal_lm).__name__} is not causal: a token sees the tokens behind it, as in "
            f"an encoder such as BERT; {fix}choose a causal LM such as Llama or Qwen"
        )


@torch.no_grad()
def check_positions(causal_lm: nn.Module, seq_len: int, packing: str) -> list[str]:
    """A line if sequences are longer than the model was made for; ConfigError if it cannot."""
    limit = positions_of(causal_lm)
    takes_positions = "position_ids" in inspect.signature(causal_lm.forward).parameters

    def has(number: int) -> bool:
        """Whether a sequence may have so many tokens; if possible only the last are tried."""
        positions = torch.arange(max(0, number - 2) if takes_positions else 0, number)
        arguments = {"position_ids": positions.unsqueeze(0)} if takes_positions else {}
        tokens = some_tokens(causal_lm, len(positions))
        try:
            logits_of(causal_lm, tokens, **arguments)
        except Exception:  # IndexError of an embedding, RuntimeError of another table
            return False
        return True

    is_tried = takes_positions or 0 < limit < seq_len <= MOST_TOKENS
    if is_tried and not has(seq_len) and has(2):
        most = bisect.bisect_left(range(seq_len), True, key=lambda number: not has(number + 1))
        raise ConfigError(
            f"data.seq_len={seq_len}: it has a table of {most} positions, and none beyond; write "
            f"data.seq_len={most} or less"
        )
    notes = []
    if 0 < limit < seq_len:
        notes.append(
            f"data.seq_len={seq_len} is beyond the {limit} positions of its config.json; they are "
            "computed, so it trains, but it may not know those beyond"
        )
    if takes_positions and depends_on_length(causal_lm, seq_len):
        what = "what it makes of a text depends on the longest sequence beside it (rope_parameters"
        if packing != "concat":  # then that depends on train.micro_batch_size
            own = range(TOKENS, seq_len)
            most = bisect.bisect_left(own, True, key=lambda n: depends_on_length(causal_lm, n + 1))
            raise ConfigError(
                f"data.packing={packing} with data.seq_len={seq_len}: {what} in its config.json); "
                f"write data.seq_len={own[0] + most} or less, or data.packing=concat"
            )
        notes.append(
            f"{what}): it learns as in {seq_len} tokens, and is asked as in as many as there are"
        )
    return notes


def depends_on_length(causal_lm: nn.Module, seq_len: int) -> bool:
    """Whether tokens have other logits if one at the end of a sequence of ``seq_len`` follows."""
    tokens, positions = some_tokens(causal_lm, TOKENS + 1), torch.arange(TOKENS + 1)
    positions[-1] = max(TOKENS, seq_len - 1)
    alone = logits_of(causal_lm, tokens[:, :TOKENS])
    try:
        found = logits_of(causal_lm, tokens, position_ids=positions.unsqueeze(0))[:, :TOKENS]
    except Exception:  # it takes no positions that are apart
        return False
    return bool((found - alone).abs().max() > 1e-5 * alone.abs().max())


def positions_of(causal_lm: nn.Module) -> int:
    """How many positions its config.json speaks of; 0 if of none."""
    text = causal_lm.config.get_text_config()
    return next((getattr(text, key) for key in LIMITS if getattr(text, key, None)), 0)


@torch.no_grad()
def generation_problem(causal_lm: nn.Module) -> str:
    """What is wrong when it generates with its cache, as at inference; empty if nothing is."""
    most = (positions_of(causal_lm) or TOKENS + NEW_TOKENS) - NEW_TOKENS
    tokens = some_tokens(causal_lm, max(1, min(TOKENS, most)))
    try:
        made = causal_lm.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, use_cache=True,
            min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    except Exception as error:  # whatever its code raises
        return f"generate() fails with it ({first_words(error)})"
    expected = logits_of(causal_lm, made.sequences[:, :-1])[0, tokens.shape[1] - 1 :]
    apart = (torch.cat(made.logits) - expected).abs().max() / expected.abs().max()
    return f"generate() has other logits than training, by {apart:.0%}" if apart > 0.01 else ""


def logits_of(causal_lm: nn.Module, input_ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    return causal_lm(input_ids=input_ids, **more, use_cache=False, return_dict=True).logits
