"""Every mistake in a configuration is one line with its location, its value and its fix."""

import contextlib
import io
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import tiny
from trainstack.__main__ import main
from trainstack.config.load import load
from trainstack.config.other_names import LACKING, OTHER_NAMES, OTHER_VALUES, THEIRS
from trainstack.config.problems import all_keys, suggestion
from trainstack.config.schedules import SCHEDULES
from trainstack.errors import ConfigError, Refused
from trainstack.job.freeze import keep_templates
from trainstack.run.identity import changed_settings, check_identity

SHIPPED_FILE = tiny.ROOT / "config.yaml"
SHIPPED = SHIPPED_FILE.read_text()


def check(*arguments) -> subprocess.CompletedProcess:
    """``python -m trainstack config``, as it answers; in this process, which is much faster."""
    command, out, err = ["config", *map(str, arguments)], io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with streams[0], streams[1], contextlib.chdir(tiny.ROOT):
        code = main(command)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def complaint(result: subprocess.CompletedProcess) -> str:
    """The one line on stderr; fails if there is more, less, or a traceback."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in lines[0]
    assert len(lines[0]) < 300
    return lines[0]


def changed(old: str, new: str) -> str:
    assert old in SHIPPED
    return SHIPPED.replace(old, new, 1)


FILES = {
    "B02 empty": ("", r"holds nothing instead of sections; start from"),
    "B02 a list": ("- a\n- b\n", r"holds a sequence instead of sections"),
    "B03 a tab": ("run:\n\tname: x\n", r"config\.yaml:2:1: a tab at the start .* spaces"),
    "B03 syntax": ("run: {name: x\n", r"config\.yaml:2:1: .*fix the line"),
    "B04 repeated": (
        changed("  seed: 1234", "  seed: 1\n  seed: 2"),
        r"config\.yaml:10: run\.seed: is repeated, first on line 9; remove one",
    ),
    "B05 unknown": (
        changed("learning_rate:", "learing_rate:"),
        r"config\.yaml:\d+: optim\.learing_rate: no such key; did you mean optim\.learning_rate\?",
    ),
    "B07 text": (
        changed("learning_rate: 1.2e-2", "learning_rate: abc"),
        r"config\.yaml:\d+: optim\.learning_rate=abc: not a number; write for example 2e-5",
    ),
    "B07 quoted": (
        changed("learning_rate: 1.2e-2", 'learning_rate: "1.2e-2"'),
        r"optim\.learning_rate=1\.2e-2: not a number",
    ),
    "B07 nan": (changed("learning_rate: 1.2e-2", "learning_rate: .nan"), r"not a finite number"),
    "B08 octal": (changed("max_steps: 1000", "max_steps: 08"), r"max_steps=08: not a whole number"),
    "B12 a tag": (
        changed("name: demo ", 'name: !!python/object/apply:os.system ["touch CANARY"] '),
        r"config\.yaml:8: run\.name: the tag .*python/object/apply:os\.system is not allowed",
    ),
    "a sign taken for a comment": (
        changed("  split_on: null", "  split_on: ###"),
        r"config\.yaml:\d+: data\.split_on: no value but a comment, ###.*; quote it if # is part",
    ),
    "a section as a number": (changed("log:\n", "log: 5\nlog2:\n"), None),
}


@pytest.mark.parametrize("name", FILES)
def test_a_mistake_in_the_file_is_one_line_with_location_value_and_fix(name, tmp_path):
    text, pattern = FILES[name]
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("CANARY", str(tmp_path / "canary")))
    result = check("--config", path)
    if pattern is None:
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert "log=5: not a section; put its keys below log:" in result.stderr
    else:
        assert re.search(pattern, complaint(result)), result.stderr
    assert not (tmp_path / "canary").exists()


def test_a_file_holds_only_what_differs_from_the_shipped_one(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("run: {name: mine}\noptim:\n  learning_rate: 1e-3\n")
    wanted = load(tiny.ROOT / "config.yaml", ["run.name=mine", "optim.learning_rate=1e-3"])
    assert load(path, []) == wanted


@pytest.mark.parametrize(("written", "meant"), [("null", []), ("one two", ["one two"])])
def test_the_prompt_of_an_earlier_version_is_the_only_one(tmp_path, written, meant):
    path = tmp_path / "config.yaml"
    path.write_text(f"eval:\n  sample_prompt: {written}\n")
    assert load(path, []).eval.prompts == meant
    assert load(SHIPPED_FILE, [f"eval.sample_prompt={written}"]).eval.prompts == meant
    assert load(path, ["eval.prompts=[three]"]).eval.prompts == ["three"]


WRONG_PROMPTS = ("[3]", "[[]]", "[null]", "[[{role: user}]]", "[{role: user, content: hi}]")


@pytest.mark.parametrize("prompts", WRONG_PROMPTS)
def test_a_prompt_that_is_none_is_one_line_that_says_what_to_write(prompts):
    with pytest.raises(ConfigError, match="no prompt; write a text, or messages as") as found:
        load(SHIPPED_FILE, [f"eval.prompts={prompts}"])
    assert len(found.value.problems) == 1
    assert load(SHIPPED_FILE, ["eval.prompts=[nothing, [{role: user, content: hi}]]"]).eval.prompts


def test_what_is_missing_from_the_shipped_file_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text(SHIPPED[: SHIPPED.index("\nlog:")])
    monkeypatch.setattr("trainstack.config.load.SHIPPED", path)
    with pytest.raises(ConfigError, match="log: missing; copy its line"):
        load(path, [])


def test_a_file_that_is_not_there_is_named():
    assert "nowhere.yaml: no such file; check its path" in complaint(
        check("--config", "nowhere.yaml")
    )


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "c.yaml").write_bytes("run: é".encode("latin-1"))
    assert "save it as UTF-8" in complaint(check("--config", tmp_path / "c.yaml"))


OVERRIDES = [
    ("optim.learning_rate=abc", "not a number; write for example 2e-5"),
    ("optim.learning_rate=2e-5x", "not a number"),
    ("optim.learning_rate=nan", "not a number"),
    ("optim.learning_rate=.inf", "not a finite number"),
    ("optim.learning_rate=-1", "out of range; write a number more than 0"),
    ("train.max_steps=0", "at least 1"),
    ("train.max_steps=08", "not a whole number"),
    ("train.max_steps=yes", "not a whole number"),
    ("train.max_steps=1:30", "not a whole number"),
    ("train.max_steps=1.5", "not a whole number"),
    ("train.torch_compile=yes", "neither true nor false"),
    ("train.precision=bfloat16", "did you mean bf16?"),
    ("train.global_batch_size=30", "no multiple of train.micro_batch_size=8 x 1 processes"),
    ("data.seq_len=0", "at least 2"),
    ("optim.adam_beta1=1", "less than 1"),
    ("checkpoint.save_total_limit=1", "at least 2"),
    ("model.init=new", "not one of scratch or pretrained"),
    ("log.report_to=[mlflow]", "not one of tensorboard"),
    ("run.name=a b", "not a plain name"),
    ("run.name=$(touch canary)", "not a plain name"),
    ("run.name=-rf", "not a plain name"),
    ("run.name=../up", "not a plain name"),
    ("run.name=ä", "not a plain name"),
    ("run.name='a'\"b", "not a plain name"),
    ("run.name=a\nb", "not a plain name"),
    ("run.name=" + "x" * 101, "not a plain name"),
    ("model.name=", "not a text"),
    ("data.subset=5", "write it in quotes: data.subset='\"5\"'"),
    ("data.text_field=1e3", "write it in quotes: data.text_field='\"1e3\"'"),
    ("data.subset=true", "write it in quotes: data.subset='\"true\"'"),
    ("data.chat_date=2026-02-30", "no such day; write for example 2026-01-01"),
    ('optim.learning_rate="1e-3"', "not a number; write 0.001"),
    ("data.eval_fraction=5%", "not a number; write 0.05"),
    ("train.max_steps=1e3", "not a whole number; write 1000"),
    ("train.max_steps='100'", "in quotes it is a text; write 100 without them"),
    ("train.max_steps=10k", "not a whole number; write 10000"),
    ("train.max_steps=1,000", "not a whole number; write 1000"),
    ("train.max_steps=010", "not a whole number; write 10"),
    ("train.max_steps=none", "write null if you mean none"),
    ("guard.spike_sigma=off", "write null if you mean none"),
    ("guard.max_skips=none", "not a whole number; write for example 8"),
    ("train.torch_compile=1", "neither true nor false; write true"),
    ("train.torch_compile='no'", "neither true nor false; write false"),
    ("log.report_to=tensorboard", "not a list; write [tensorboard]"),
    ("log.report_to=null", "not a list; write [tensorboard], or []"),
    ("data.columns=null", "or {} for none"),
    ("optim=null", "optim is a section: write optim.key=value"),
    ("data.name=https://huggingface.co/datasets/org/x", "a URL of the Hub; write org/x"),
    ("data.name=hf.co/datasets/squad/viewer/a/b", "a URL of the Hub; write squad"),
    ("data.name=hf://datasets/org/x@v1/a.jsonl", "a URL of the Hub; write org/x"),
    ("model.name=https://huggingface.co/org/x/tree/main", "a URL of the Hub; write org/x"),
    ("data.name=https://host.org/a.jsonl", "bring what it names to this machine"),
    ("data.name=data/*.jsonl", "for several files name their folder, or"),
    ("data.name=a.jsonl,b.jsonl", "for several files name their folder, or"),
    ("data.name=[./a.jsonl, ./b.jsonl]", "for several files name their folder, or"),
    ("data.name={train: ./a.jsonl}", "for several files name their folder, or"),
    ("data.name=~nobody-has-this-name/a", "the ~ is of nobody here; write the path itself"),
    ("optim.warmup_steps=0.1", "it counts, and is no share; write optim.warmup_ratio=0.1"),
    ("eval.eval_steps=0.1", "it counts, and is no share; write for example 8"),
    ("checkpoint.save_steps=epochs", "not a whole number, auto or epoch; did you mean epoch?"),
    ("checkpoint.save_steps=x", "not a whole number, auto or epoch; write for example 8"),
    ("checkpoint.save_steps=no", "a run always saves"),
    ("eval.eval_steps=steps", "not a whole number or epoch; write how many steps"),
    ("eval.eval_steps=no", "write null if you mean none"),
    ("log.report_to=wandb", "not a list; write [wandb]"),
    ("log.report_to=none", "not a list; write [], and metrics.jsonl alone is written"),
    ("log.report_to=all", "not a list; name them, as in [tensorboard, html]"),
    ("log.report_to=[tensorboard, all]", "or trackio; name them, as in [tensorboard, html]"),
    ("log.report_to=mlflow", "not a list; write [tensorboard], or [] for metrics.jsonl alone"),
    ("adapter=lora", "adapter is a section: write adapter.type=lora"),
    ("model=org/x", "model is a section: write model.name=org/x"),
    ("optim=adamw_torch", "optim is a section; the optimizer is AdamW, and section optim has"),
    ("adapter.type=qlora", "weights are not quantised here; write lora"),
    ("adapter.target_modules=q_proj,v_proj", "write a list: [q_proj, v_proj]"),
    ("data.name=$DATA/a.jsonl", "$DATA is not replaced here; write what it stands for"),
    ("model.name=/data/${oc.env:USER}/m", "${oc.env:USER} is not replaced here"),
    ("data.chat_template='%HOME%/a.jinja'", "%HOME% is not replaced here"),
    ("data.name=my data/a.jsonl", "neither org/name on the Hub nor a path; a path starts with"),
    ("model.name=org/x@v1", "and a revision, a subset and a split are settings of their own"),
    ("data.split=train[:50%]", "a part of a split; write a whole one (train)"),
    ("data.eval_split=train[:9]+test[:9]", "a part of a split; write a whole one (train)"),
    ("data.split=train+test", "several splits; write one; data.mixture takes others"),
    ("data.split=[train, test]", "write one; data.mixture takes others"),
    ("train.max_steps=-1", "at least 1, or null"),
    ("optim.learning_rate", "without spaces"),
    ("=", "without spaces"),
    ("nothing", "write section.key=value"),
    ("lr=1", "did you mean optim.learning_rate?"),
    ("train.gradient_accumulation_steps=4", "it is derived"),
]


@pytest.mark.parametrize(("override", "fix"), OVERRIDES, ids=lambda value: repr(value)[:40])
def test_a_mistake_on_the_command_line_is_one_line_that_repeats_it(override, fix, tmp_path):
    line = complaint(check(override))
    assert fix in line
    assert "command line" in line or "global_batch_size=30" in line
    assert not (tiny.ROOT / "canary").exists()


FOREIGN = {  # as people know it -> what they read
    "lora_r": "adapter.r?",
    "lora_rank": "adapter.r?",
    "lora_alpha": "adapter.alpha?",
    "lora_dropout": "adapter.dropout?",
    "lora_target_modules": "adapter.target_modules?",
    "lora_target": "adapter.target_modules?",
    "lora_target_linear": "adapter.target_modules?",
    "use_peft": "adapter.type?",
    "finetuning_type": "adapter.type?",
    "peft_config": "write adapter: {type: lora}",
    "use_dora": "of LoRA there is what section adapter has",
    "load_in_4bit": "not quantised",
    "qlora": "not quantised",
    "bnb_4bit_quant_type": "not quantised",
    "report_to": "log.report_to?",
    "use_wandb": "log.report_to?",
    "wandb_project": "write log.report_to: [wandb]",
    "run_name": "run.name?",
    "output_dir": "run.name?",
    "load_best_model_at_end": "eval.keep_best?",
    "metric_for_best_model": "eval.keep_best",
    "greater_is_better": "eval.keep_best",
    "early_stopping_patience": "eval.patience?",
    "early_stopping_threshold": "eval.patience",
    "num_train_epochs": "train.num_train_epochs?",
    "max_epochs": "train.num_train_epochs?",
    "save_strategy": "checkpoint.save_steps?",
    "evaluation_strategy": "eval.eval_steps?",
    "eval_strategy": "eval.eval_steps?",
    "logging_strategy": "log.logging_steps?",
    "save_only_model": "-m trainstack export RUN --to FOLDER",
    "push_to_hub": "export RUN --to FOLDER --push ORG/NAME",
    "hub_model_id": "export RUN --to FOLDER --push ORG/NAME",
    "hub_token": "export RUN --to FOLDER --push ORG/NAME",
    "resume_from_checkpoint": "bash submit.sh --resume RUN",
    "do_eval": "it is so without a setting",
    "do_train": "it is so without a setting",
    "predict_with_generate": "eval.prompts",
    "warmup_ratio": "optim.warmup_ratio?",
    "warmup_steps": "optim.warmup_steps?",
    "num_warmup_steps": "optim.warmup_steps?",
    "eval_on_start": "it is so without a setting",
    "per_device_train_batch_size": "train.micro_batch_size?",
    "per_device_eval_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "derived",
    "accumulate_grad_batches": "derived",
    "include_num_input_tokens_seen": "it is so without a setting",
    "neftune_noise_alpha": "no such thing",
    "optim": "the optimizer is AdamW",
    "optimizer": "the optimizer is AdamW",
    "deepspeed": "DDP",
    "fsdp": "DDP",
    "devices": "train.slurm",
    "num_nodes": "train.slurm",
    "bf16": "train.precision?",
    "torch_dtype": "train.precision?",
    "gradient_checkpointing": "train.activation_checkpointing?",
    "gradient_clip_val": "optim.max_grad_norm?",
    "flash_attn": "model.attn_implementation?",
    "dataset": "data.name?",
    "dataset_text_field": "data.text_field?",
    "val_set_size": "data.eval_fraction?",
    "cutoff_len": "data.seq_len?",
    "sample_packing": "data.packing?",
    "train_on_inputs": "data.format?",
    "template": "data.chat_template?",
    "dataloader_num_workers": "bash download_data_model.sh",
    "trust_remote_code": "no code of a model's repository runs here",
    "tokenizer_name": "the tokenizer is the model's own",
    "val_check_interval": "eval.eval_steps?",
    "log_every_n_steps": "log.logging_steps?",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_who_knows_another_trainer_finds_each_setting_by_the_name_he_knows(name):
    for written in (name, f"trainer.{name}", f"train.{name}"):
        if written not in all_keys() and written != "optim":
            assert FOREIGN[name] in suggestion(written), written


def test_the_names_of_other_trainers_lead_to_settings_that_exist_and_none_to_two():
    assert set(THEIRS) <= set(all_keys())
    names = " ".join([*THEIRS.values(), *LACKING.values()]).split()
    assert len(names) == len({*names}), {name for name in names if names.count(name) > 1}
    keys = [f".{key.rpartition('.')[2]}" for key in all_keys()]
    assert [name for name in names if f".{name}" in keys] == ["type", "dropout"]
    sections = {key.partition(".")[0] for key in all_keys()}
    for text in (*LACKING, *OTHER_VALUES):
        for section, key in re.findall(r"\b([a-z]+)\.(?!slurm)([a-z_]+)", text):
            assert section not in sections or f"{section}.{key}" in all_keys(), text


SECTIONS_AS_VALUES = {
    "adapter: lora": "adapter=lora: not a section; write adapter: {type: lora}",
    "model: org/x": "model=org/x: not a section; write model: {name: org/x}",
    "optim: adamw_torch": "optim=adamw_torch: not a section; the optimizer is AdamW",
    "train: sft": "train=sft: not a section; put its keys below train:",
}


@pytest.mark.parametrize("text", SECTIONS_AS_VALUES)
def test_a_value_for_a_section_is_told_where_it_goes(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"{text}\n")
    assert SECTIONS_AS_VALUES[text] in complaint(check("--config", path))


def test_all_problems_are_told_at_once():
    result = check("train.micro_batchsize=8", "optim.learning_rate=2e-5x", "data.seq_len=-1")
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert lines[0] == "config: error: 3 problems in the configuration"
    assert "did you mean train.micro_batch_size?" in lines[1] + lines[2] + lines[3]


@pytest.mark.parametrize("text", ["2e-5", "1e-4", "0.00002", "2.0E-5", "1"])
def test_every_way_to_write_a_number_is_one(text):
    loaded = load(tiny.ROOT / "config.yaml", [f"optim.learning_rate={text}"])
    assert loaded.optim.learning_rate == float(text)


@pytest.mark.parametrize(
    "text",
    ["###", "a #b", "---", "--- b", "...", "***", "&a", "!", "%", "|", ">", "? x", "- x", "  "],
)
def test_a_text_on_the_command_line_is_whole(text):
    loaded = load(tiny.ROOT / "config.yaml", [f"data.split_on={text}"])
    assert loaded.data.split_on == text


@pytest.mark.parametrize("text", ["'###'", '"###"', " '###' "])
def test_quotes_on_the_command_line_are_as_in_the_file(text):
    loaded = load(tiny.ROOT / "config.yaml", [f"data.split_on={text}"])
    assert loaded.data.split_on == "###"


def test_a_thousand_may_be_written_with_an_underscore():
    loaded = load(tiny.ROOT / "config.yaml", ["train.max_steps=1_000"])
    assert loaded.train.max_steps == 1000


@pytest.mark.parametrize("name", ["1e3", "yes", "null", "08", "1_000", "demo", "a.b-c_d"])
def test_the_resolved_file_reads_back_as_it_was(name, tmp_path):
    loaded = load(tiny.ROOT / "config.yaml", [f"run.name='{name}'", "data.subset='on'"])
    (tmp_path / "c.yaml").write_text(loaded.to_yaml())
    assert load(tmp_path / "c.yaml", []) == loaded
    assert yaml.safe_load(loaded.to_yaml())["run"]["name"] is not None


def test_a_local_path_may_hold_anything_and_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load(
        tiny.ROOT / "config.yaml", ["model.name='./a $(touch canary) b'", "data.name=/x/ü"]
    )
    assert loaded.model.name == str(tmp_path / "a $(touch canary) b")
    assert loaded.data.name == "/x/ü"


@pytest.mark.parametrize(
    ("processes", "micro", "fix"),
    [
        (3, 4, "write train.global_batch_size=24 or 36"),
        (2, 12, "write train.global_batch_size=24 or 48, or train.micro_batch_size=8"),
        (64, 1, "write train.global_batch_size=64, or take 32 processes"),
        (5, 1, "write train.global_batch_size=30 or 35"),
    ],
)
def test_an_uneven_split_names_three_numbers_and_the_nearest_even_ones(processes, micro, fix):
    batch = ("train.global_batch_size=32", f"train.micro_batch_size={micro}")
    line = complaint(check("--world-size", processes, *batch))
    assert (
        f"global_batch_size=32 is no multiple of train.micro_batch_size={micro} x {processes}"
        in line
    )
    assert fix in line


def test_the_arithmetic_of_the_batch_is_printed():
    result = check("--world-size", 2, "train.global_batch_size=32", "train.micro_batch_size=4")
    assert "32 sequences = 2 processes x 4 x 4 micro steps = 4,096 tokens per step" in result.stdout


@pytest.mark.parametrize(("processes", "shared"), [(1, "4 x 2"), (2, "4 x 1"), (8, "1 x 1")])
def test_many_processes_have_smaller_micro_batches(processes, shared):
    result = check(
        "--world-size", processes, "train.global_batch_size=8", "train.micro_batch_size=4"
    )
    assert f" = {processes} processes x {shared} micro steps" in result.stdout


def test_settings_of_another_run_are_refused_with_the_difference():
    with pytest.raises(ConfigError, match=r"run\.seed=2 \(the run has 1\); put it back") as error:
        check_identity({"run.seed": 1, "a": 1}, {"run.seed": 2, "a": 1}, "r")
    assert error.value.code == 78


def test_only_a_change_that_changes_something_is_told():
    """Of no adapter, its rank is none."""
    saved, now = (
        load(tiny.ROOT / "config.yaml", [f"adapter.r={r}", f"log.logging_steps={r}"]).model_dump()
        for r in (8, 16)
    )
    assert changed_settings(saved, now) == ["log.logging_steps: 8 -> 16"]


KWARGS = "optim.lr_scheduler_kwargs"
MISFITS = [
    # of another schedule, by the line in the file; needed and missing; of a wrong type or range
    (["cosine"], rf"config\.yaml:\d+: {KWARGS}: cosine takes num_cycles, and not min_lr_rate; wr"),
    (["linear"], rf"linear takes no settings, and not min_lr_rate; write {KWARGS}={{}}$"),
    (["constant"], "constant takes no settings, and not min_lr_rate"),
    (["inverse_sqrt", "{timescale: 9, a: 1}"], rf"not a; write {KWARGS}={{timescale: 9}}$"),
    (["warmup_stable_decay", "{}"], "needs num_decay_steps; write for example optim.*_steps: 100}"),
    (["cosine_with_min_lr", "{}"], "and has neither; write optim.*={min_lr_rate: 0.1}"),
    (["cosine_with_min_lr", "{min_lr: 1e-5, min_lr_rate: 0.1}"], "has both; .*{min_lr: 1e-05}$"),
    (["cosine_with_min_lr", "{min_lr_rate: 1.5}"], r"min_lr_rate=1\.5: out of range; .*at most 1"),
    (
        ["cosine_with_min_lr", "{min_lr: -1}"],
        r"\.min_lr=-1: out of range; .*at least 0",
    ),
    (["polynomial", "{power: -2}"], r"power=-2: out of range; write a number more than 0"),
    (["cosine", "{num_cycles: 0}"], r"num_cycles=0: out of range; write a number more than 0"),
    (["cosine", '{num_cycles: "1"}'], r"num_cycles=1: in quotes it is a text"),
    (["inverse_sqrt", "{timescale: 0.5}"], r"timescale=0\.5: not a whole number"),
    (
        ["warmup_stable_decay", "{num_decay_steps: 9, decay_type: exp}"],
        r"decay_type=exp: not one of linear, cosine or 1-sqrt",
    ),
    # names that are none here
    (
        ["greedy"],
        "not one of .*; that one follows the loss, not the step",
    ),
    (["reduce_lr_on_plateau"], "not one of .*; that one follows the loss, not the step"),
    (["wsd"], r"did you mean warmup_stable_decay\?"),
    (["rex"], "not one of constant, .*; choose one"),
]


@pytest.mark.parametrize(("words", "pattern"), MISFITS, ids=range(len(MISFITS)))
def test_a_schedule_and_settings_that_do_not_fit_are_one_line_with_the_fix(words, pattern):
    line = complaint(check(*map("{}={}".format, ("optim.lr_scheduler_type", KWARGS), words)))
    assert re.search(pattern, line), line


def test_every_schedule_that_the_shipped_file_names_beside_its_own_runs_with_its_settings():
    (comment,) = re.findall(r"(?m)^  lr_scheduler_type: .*#(.*)", SHIPPED)
    named = [name for name in SCHEDULES if re.search(rf"\b{name}\b", comment)]
    assert named
    for name in named:
        assert check(f"optim.lr_scheduler_type={name}").returncode == 0


LONG = "x" * 5000
ODD = [
    # what was written -> the part of the message that repeats it
    ([f"run.name={LONG}"], "run.name=xxx"),
    (["run.name=" + "9" * 5000], "(5,009 characters) (command line): not a plain name"),
    (["run.seed=" + "9" * 5000], "not a whole number"),
    ([f"{LONG}=1"], "(5,002 characters) (command line): no such key"),
    (["optim.learning_rate.peak=1"], "optim.learning_rate.peak=1 (command line): no such key"),
    (["optim.lr_scheduler_kwargs={min_lr_rate: null}"], "not a number; write for example 2e-5"),
    (["optim.lr_scheduler_kwargs.a.b=1"], "optim.lr_scheduler_kwargs.a.b=1 (command line): not a"),
    (
        ["optim.lr_scheduler_kwargs=[1]"],
        "lr_scheduler_kwargs=[1] (command line): no keys with values",
    ),
    (["run.name=&a [*a]"], "nested without end; write sections with plain keys"),
    (["run.name=" + "[" * 5000], "nested without end"),
    (["run=3"], "run=3 (command line): no such key"),
    (["train.global_batch_size=1000000000001"], "write train.global_batch_size=1000000000000 or"),
    (["--world-size", "0"], "0 processes cannot train; ask for at least 1"),
    (["--config", "."], "Is a directory; name a file of settings"),
]


@pytest.mark.parametrize(("arguments", "part"), ODD, ids=range(len(ODD)))
def test_the_oddest_input_is_still_one_short_line(arguments, part):
    assert part in complaint(check(*arguments))


ODD_FILES = [
    (changed("name: demo ", f"name: {LONG} "), r"config\.yaml:8: run\.name=x{60}\.\.\. \(5,000 ch"),
    (changed("name: demo ", 'name: "a\\nb" '), r"config\.yaml:8: run\.name='a\\nb': not a plain"),
    (changed("  seed:", f"  {LONG[:900]}: 1\n  seed:"), r"yaml:9: run\.x+\.\.\. \(904 characters"),
    (changed("  seed:", f"  {LONG}: 1\n  seed:"), r"config\.yaml:9:\d+: .*; fix the line 'x{60}'"),
    (changed("  seed: 1234", "  seed: &a {b: *a}"), r"nested without end"),
    (
        changed("  seed: 1234", "  ? [a, b]\n  : 1\n  seed: 1234"),
        r"config\.yaml:9: run\.a sequence: no such key",
    ),
    (
        changed("  seed: 1234", "  seed: 1:30"),
        r"config\.yaml:9: run\.seed=1:30: not a whole number",
    ),
    (changed("  seed: 1234", "  seed: 2026-11-23"), r"run\.seed=2026-11-23: not a whole number"),
    (changed("  seed: 1234", "  seed: -1"), r"run\.seed=-1: out of range; write a number at least"),
    (changed("  seed: 1234", "  seed: no"), r"config\.yaml:9: run\.seed=no: not a whole number"),
    (SHIPPED + "---\nrun: 1\n", r"config\.yaml:\d+:1: but found another document; fix the line"),
    (SHIPPED + "\0", r"config\.yaml: not YAML: .*remove that character"),
    (changed("global_batch_size: 16", "global_batch_size: 30"), r"train\.global_batch_size=30 is"),
]


@pytest.mark.parametrize(("text", "pattern"), ODD_FILES, ids=range(len(ODD_FILES)))
def test_the_oddest_file_is_still_one_short_line(text, pattern, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    line = complaint(check("--config", tmp_path / "config.yaml"))
    assert re.search(pattern, line), line


def test_a_tag_on_the_command_line_runs_nothing(tmp_path):
    canary = tmp_path / "canary"
    tag = f'data.subset=!!python/object/apply:os.system ["touch {canary}"]'
    assert "is not allowed; write a plain value" in complaint(check(tag))
    assert not canary.exists()


def test_file_and_command_line_are_judged_together(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(changed("save_total_limit: 3", "save_total_limit: 1"))
    result = check("--config", path, "data.seq_len=1", "lr=1")
    assert result.returncode == 2
    told = result.stderr
    assert "3 problems" in told
    assert re.search(r"config\.yaml:\d+: checkpoint\.save_total_limit=1: out of range", told)
    assert "data.seq_len=1 (command line): out of range; write a number at least 2" in told
    assert "lr=1 (command line): no such key; did you mean optim.learning_rate?" in told


def test_the_names_of_other_trainers_are_told_all_at_once():
    names = [name for name in OTHER_NAMES if name not in ("dataset", "datasets")]
    result = check(*(f"train.{name}=1" for name in names))
    assert result.returncode == 2
    told = result.stderr.splitlines()
    assert told[0] == f"config: error: {len(names)} problems in the configuration"
    for name in names:
        (line,) = [line for line in told if f" train.{name}=1 (" in line]
        assert OTHER_NAMES[name] in line


def test_the_shipped_file_has_every_key_once_with_a_comment():
    section, found = "", []
    for line in SHIPPED.splitlines():
        if match := re.match(r"(\w+):$", line):
            section = match[1]
        elif match := re.match(r"  (\w+): +\S", line):
            found.append(f"{section}.{match[1]}")
            assert re.search(r"  # \w", line), f"{line}: why would one change it?"
    assert found == all_keys()


@pytest.mark.parametrize("text", ["1e-4", "2e-5", "1_000"])
def test_the_file_takes_the_numbers_that_people_write(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(changed("learning_rate: 1.2e-2", f"learning_rate: {text}"))
    assert load(path, []).optim.learning_rate == float(text)


TEXTS = [
    "", " ", "~", "null", "yes", "08", "1e3", "1_000", ".inf", "true", "1:30", "=", "<<", "- a",
    "a: b", "# no comment", "'", '"', "$(touch canary)", "two\nlines\n", "\ttab",
    "ü 漢 \u2028 \x85", "!!python/name:os.system", "&a *a", "{", "%", "x" * 5000, "word " * 300,
    "9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text)[:20])
def test_any_text_reads_back_as_it_was(text, tmp_path):
    loaded = load(tiny.ROOT / "config.yaml", [])
    asked = loaded.model_copy(update={"eval": loaded.eval.model_copy(update={"prompts": [text]})})
    (tmp_path / "c.yaml").write_text(asked.to_yaml(), encoding="utf-8")
    assert load(tmp_path / "c.yaml", []).eval.prompts == [text]


def test_the_resolved_configuration_that_is_printed_reads_back(tmp_path):
    result = check("run.name=other", "optim.learning_rate=2e-5")
    assert (result.returncode, result.stderr) == (0, "")
    (tmp_path / "c.yaml").write_text(result.stdout)
    loaded = load(tmp_path / "c.yaml", [])
    assert (loaded.run.name, loaded.optim.learning_rate) == ("other", 2e-5)


def test_a_run_keeps_the_chat_templates_that_it_was_submitted_with(tmp_path):
    other = {"name": "b", "weight": None}
    own = {name: tmp_path / f"{name}.jinja" for name in ("one", "two")}
    for name, path in own.items():
        path.write_text(name)
    mixture = json.dumps([{**other, "chat_template": str(own["two"])}, {**other, "name": "c"}])
    overrides = [f"data.chat_template={own['one']}", f"data.mixture={mixture}"]
    config = load(tiny.ROOT / "config.yaml", overrides)
    folder = tmp_path / "chat_templates"
    kept = keep_templates(config, folder)
    for path in own.values():
        path.write_text("changed")
    found = [source.chat_template for source in kept.data.sources]
    assert [path and Path(path).read_text() for path in found] == ["one", "two", "one"]
    assert keep_templates(kept, folder).to_yaml() == kept.to_yaml()
    plain = load(tiny.ROOT / "config.yaml", [])
    assert keep_templates(plain, tmp_path / "none") == plain and not (tmp_path / "none").exists()


def test_the_path_of_a_template_is_no_part_of_what_a_run_is(tmp_path):
    other = {"name": "b", "weight": None}

    def of(*paths: str) -> dict:
        entries = json.dumps([{**other, "chat_template": paths[1]}])
        words = [f"data.chat_template={paths[0]}", f"data.mixture={entries}"]
        return load(tiny.ROOT / "config.yaml", words).identity()

    assert of("/a/x.jinja", "/a/y.jinja") == of("/b/x.jinja", "/b/y.jinja")
    landed = of("/a/x.jinja", "/a/y.jinja")  # with what an earlier version wrote too
    landed["data.mixture"] = [{**landed["data.mixture"][0], "chat_template": "/a/y.jinja"}]
    check_identity(landed, of("/b/x.jinja", "/b/y.jinja"), "r")
    landed["data.mixture"][0]["split"] = "other"
    with pytest.raises(Refused, match="data.mixture"):
        check_identity(landed, of("/b/x.jinja", "/b/y.jinja"), "r")
