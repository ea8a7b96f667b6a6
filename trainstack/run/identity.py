"""What may not change between two attempts of a run, and what may."""

import json
from typing import Any

from trainstack.config.schema import Config
from trainstack.errors import Refused


def identity(config: Config, key: str, base: str | None = None) -> dict[str, Any]:
    """What may not change between two attempts of a run; ``key``: of its corpus.

    ``base``: of the model that its adapter belongs to; None: it has none.
    """
    return {**config.identity(), "tokens": key, **({"base": base} if base else {})}


def identity_beside(config: Config, saved: dict[str, Any]) -> dict[str, Any]:
    """The same as far as settings tell: tokens, and the model of an adapter, as a run has them."""
    return identity(config, saved["tokens"], config.adapter.type and saved.get("base"))


def check_identity(
    saved: dict[str, Any],
    wanted: dict[str, Any],
    run_name: str,
    fix: str = "choose another run.name",
) -> None:
    """Refused if any of it differs, showing each that does.

    A run from before there was a setting of the data may go on: the tokens say all about it.
    """
    different = [
        f"{key}={written(wanted.get(key))} (the run has {written(saved.get(key))})"
        for key in sorted(saved.keys() | wanted.keys())
        if (key in saved or not key.startswith("data."))
        and (key != "base" or {saved.get("adapter.type"), wanted.get("adapter.type")} == {"lora"})
        and not is_same(saved.get(key), wanted.get(key))
    ]
    if different:
        of_files = saved.get("tokens") != wanted.get("tokens") and len(different) == 1
        hint = ", for files of the data or of the tokenizer are others" if of_files else ""
        if saved.get("base") != wanted.get("base") and len(different) == 1:
            hint = ", for its adapter learned beside other weights of model.name"
        raise Refused(
            f"run {run_name} cannot continue with {', '.join(different)}{hint}; "
            f"put it back, or {fix}"
        )


def written(value: Any) -> str:
    """As config.yaml has it, without quotes where a word needs none."""
    return value if isinstance(value, str) else json.dumps(value)


def is_same(saved: Any, wanted: Any) -> bool:
    """Whether two values are; of data sets of a mixture, in the settings that both have."""
    if isinstance(saved, list) and isinstance(wanted, list) and len(saved) == len(wanted):
        return all(map(is_same, saved, wanted))
    if isinstance(saved, dict) and isinstance(wanted, dict):
        return all(wanted[key] == saved[key] for key in saved.keys() & wanted.keys())
    return saved == wanted


def changed_settings(saved: dict[str, dict], now: dict[str, dict]) -> list[str]:
    """One line for each setting ``section.key`` that differs between two configurations.

    One that was not there before, in an earlier version of the code, was not changed by anybody.
    Those of the data are left out: what of them may change makes the same tokens. So are those of
    the run, which say what it is called and where it came from, and of an adapter, which may not
    change where there is one.
    """
    return [
        f"{section}.{key}: {saved[section][key]} -> {value}"
        for section, values in now.items()
        for key, value in values.items()
        if section not in ("adapter", "data", "run")
        and key in saved.get(section, {})
        and saved[section][key] != value
    ]
