"""What other trainers call the settings that we have, so that an unknown key gets a fix.

They are TrainingArguments, TRL, axolotl, torchtune, litgpt, LLaMA-Factory and torchtitan.
"""

THEIRS = {  # our key -> the names that other trainers have for it
    "train.micro_batch_size": (
        "per_device_train_batch_size local_batch_size device_batch_size batch_size"
    ),
    "train.global_batch_size": "total_batch_size train_batch_size",
    "model.name": "model_name_or_path model_name base_model checkpoint_dir hf_assets_path",
    "model.revision": "model_revision revision_of_model",
    "data.name": "dataset_name dataset datasets",
    "data.subset": "dataset_config_name",
    "data.text_field": "dataset_text_field",
    "data.eval_fraction": "val_set_size",
    "run.name": "output_dir out_dir dump_folder run_name wandb_project",
    "run.seed": "data_seed",
    "data.seq_len": (
        "max_length max_seq_length max_seq_len sequence_len sequence_length cutoff_len block_size"
    ),
    "data.packing": "sample_packing packing_strategy packed",
    "data.too_long": "truncation_mode excess_length_strategy",
    "data.format": (
        "train_on_inputs train_on_input train_on_prompt mask_prompt assistant_only_loss "
        "completion_only_loss"
    ),
    "train.num_train_epochs": "num_epochs epochs",
    "train.max_steps": "steps max_iters",
    "train.precision": "bf16 fp16 tf32 dtype mixed_precision mixed_precision_param",
    "train.torch_compile": "compile",
    "train.activation_checkpointing": "gradient_checkpointing enable_activation_checkpointing",
    "model.attn_implementation": "flash_attention sdp_attention",
    "optim.learning_rate": "lr max_lr",
    "optim.lr_scheduler_kwargs": "min_lr min_lr_rate min_lr_ratio cosine_min_lr_ratio num_cycles",
    "optim.lr_scheduler_type": "lr_scheduler scheduler decay_type",
    "optim.warmup_steps": "warmup_ratio warmup_iters num_warmup_steps lr_warmup_steps",
    "optim.adam_beta1": "beta1 betas",
    "optim.adam_beta2": "beta2",
    "optim.adam_epsilon": "eps",
    "optim.max_grad_norm": "clip_grad_norm max_norm grad_clip",
    "checkpoint.save_steps": "save_interval interval",
    "checkpoint.save_total_limit": "keep_latest_k save_top_k load_best_model_at_end",
    "eval.eval_steps": "eval_interval evaluation_strategy eval_strategy",
    "log.logging_steps": "log_freq log_interval log_every_n_steps",
    "log.report_to": "metric_logger",
}
# another trainer's name -> our key; None: it is derived here, or not a setting
OTHER_NAMES: dict[str, str | None] = {
    name: ours for ours, names in THEIRS.items() for name in names.split()
} | dict.fromkeys(("gradient_accumulation_steps", "gradient_accumulation_iters", "world_size"))

OTHER_VALUES = {  # a value that other trainers take -> the fix
    "wsd": "did you mean warmup_stable_decay?",
    "one_cycle": "did you mean cosine_warmup_with_min_lr?",
    "CosineAnnealingLR": "did you mean cosine?",
    "reduce_lr_on_plateau": "that one follows the loss, not the step",
    "greedy": "that one follows the loss, not the step",
}
