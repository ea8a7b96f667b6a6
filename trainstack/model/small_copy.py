"""The configuration of a model made small, so that a login node can try what its code does.

Of the same kind: each type of layer, heads of the same size, the same settings of attention,
positions and experts. There are fewer layers, heads, experts, channels and tokens.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

MOST_ROWS = 512  # of an embedding
MOST_LAYERS = 8  # more where types of layers are that rare
INNER_SIZE = 32  # channels within a layer or an expert
LEAST_SIZE = 16  # a multiple of it stays what is divided; grouped products need that
HEADS = re.compile(r"(.*_)?heads(_per_layer)?|n_head|num_query_groups|(mamba_)?n_groups")
SIZE = re.compile(
    r"(.*_)?hidden_size(_global)?|(d|dim)_model|.*(emb|embd|embed|embedding|proj)_dim|n_embd"
    r"|.*embedding_size|lru_width|mamba_d_ssm|adapter_(in|out)_dim"
)
INNER = re.compile(
    r".*(intermediate_size|ffn|ff_dim|d_ff|dim_ff|dff|n_inner|mlp_dim|feed_forward).*"
)
RANK = re.compile(r".*_lora_rank|time_step_rank|mamba_dt_rank")
EXPERTS = re.compile(r"(num|n)_(local_|routed_)?experts|moe_num_experts|zero_expert_num")
CHOSEN = re.compile(r"num_experts_per_tok(en)?|moe_(top)?k|(moe_)?top_k(_experts)?|n.*_group")
LAYERS = re.compile(r"num(_hidden|_decoder)?_layers|n_layers?|(de|en)coder_layers|depth|num_blocks")
SPECIAL = re.compile(r".*_(token_id|token_index|token_idx)")
MAIN_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
PARTS = re.compile(r".*_config|decoder|encoder|(text|audio)_encoder")


def small_configs(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """From the content of a config.json, ever less different ones; all have a small vocabulary."""
    values = short_of_tokens(values)
    for is_short in (True, False):
        for heads in (4, 2, 1):
            yield narrowed(values, heads, is_short)
    yield values


def narrowed(values: dict[str, Any], heads: int, is_short: bool) -> dict[str, Any]:
    """The same with about so many heads, small layers and few experts; ``is_short``: few layers."""
    sizes = {
        key: value
        for key, value in values.items()
        if is_number(value) and (HEADS.fullmatch(key) or SIZE.fullmatch(key))
    }
    divisor = common_divisor(sizes, heads)
    chosen = [v for key, v in values.items() if CHOSEN.fullmatch(key) and is_number(v)]
    made = shortened(values) if is_short else dict(values)
    for key, value in made.items():
        if PARTS.fullmatch(key) and isinstance(value, dict):
            made[key] = narrowed(value, heads, is_short)
        elif INNER.fullmatch(key) and isinstance(value, list):
            made[key] = [min(inner, INNER_SIZE) for inner in value]
        elif HEADS.fullmatch(key) and isinstance(value, list):
            made[key] = [max(1, number // divisor) for number in value]
        elif key in sizes and not INNER.fullmatch(key):
            made[key] = max(1, value // divisor)
        elif not is_number(value):
            continue
        elif INNER.fullmatch(key):
            made[key] = min(value, INNER_SIZE)
        elif RANK.fullmatch(key):
            made[key] = min(value, 2 * INNER_SIZE)
        elif EXPERTS.fullmatch(key):
            made[key] = min(value, 2 * max([2, *chosen]))
    return made


def shortened(values: dict[str, Any]) -> dict[str, Any]:
    """The same with few layers, but with each type that the lists of layers name."""
    counts = {key: v for key, v in values.items() if LAYERS.fullmatch(key) and is_number(v)}
    number = next(iter(counts.values()), 0)
    lists = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == number}
    types = [str(row) for row in zip(*lists.values(), strict=True)] if lists else []
    kept = max([MOST_LAYERS, *(types.index(name) + 1 for name in {*types} if len({*types}) < 9)])
    if kept >= number:
        return dict(values)
    made = {**values, **{key: min(v, kept) for key, v in counts.items()}}
    made.update({key: value[:kept] for key, value in lists.items()})
    if "num_kv_shared_layers" in values:  # the last ones
        made["num_kv_shared_layers"] = (values["num_kv_shared_layers"] or 0) * kept // number
    return made


def short_of_tokens(values: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json with a small vocabulary, and its special tokens within it."""
    made = dict(values)
    made.pop("quantization_config", None)
    for key, value in values.items():
        if PARTS.fullmatch(key) and isinstance(value, dict):
            made[key] = short_of_tokens(value)
        elif "vocab" in key and is_number(value):
            made[key] = min(value, MOST_ROWS)
        elif SPECIAL.fullmatch(key) and is_number(value):
            made[key] = min(value, MOST_ROWS - 1)
    return made


def common_divisor(sizes: dict[str, int], wanted: int) -> int:
    """What leaves about so many heads, and divides the sizes of hidden states; 1 if nothing does.

    One number for all keeps relations, such as a state that is twice as large as a hidden one.
    """
    heads = [value for key, value in sizes.items() if HEADS.fullmatch(key) and value]
    hidden = [value for key, value in sizes.items() if not HEADS.fullmatch(key)]
    most = next((sizes[key] for key in MAIN_HEADS if sizes.get(key)), max(heads, default=64))
    for divisor in (*range(most // wanted, 1, -1), *range(most // wanted + 1, most + 1)):
        is_even = all(value % divisor == 0 or divisor % value == 0 for value in heads)
        if is_even and all(value % (divisor * LEAST_SIZE) == 0 for value in hidden):
            return divisor
    return 1


def corrected(
    values: dict[str, Any], may_be_wrong: Callable[[Any], bool]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """One value of a config.json corrected: its key, what a person writes, and all values then."""
    for key, value in values.items():
        if PARTS.fullmatch(key) and isinstance(value, dict):
            for name, fix, part in corrected(value, may_be_wrong):
                yield name, fix, {**values, key: part}
        elif may_be_wrong(value):
            is_plain = isinstance(value, int | float)  # else null would say something else
            fix = f'write "{key}": null' if is_plain else f'correct "{key}"'
            yield key, fix, {**values, key: None}
            yield key, f'correct "{key}"', {k: v for k, v in values.items() if k != key}


def is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
