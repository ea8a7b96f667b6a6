"""What other trainers call what we have, or lack, so that an unknown key gets a fix.

They are TrainingArguments, TRL, peft, axolotl, torchtune, litgpt, Lightning, LLaMA-Factory and
torchtitan.
"""

THEIRS = {  # our key -> the names that other trainers have for it
    "run.name": "output_dir out_dir dump_folder run_name save_dir exp_name",
    "run.seed": "data_seed",
    "model.name": (
        "model_name_or_path model_name base_model checkpoint_dir hf_assets_path "
        "pretrained_model_name_or_path model_id"
    ),
    "model.revision": "model_revision revision_of_model",
    "model.attn_implementation": (
        "flash_attention flash_attn flash_attn_2 use_flash_attention_2 sdp_attention "
        "xformers_attention attn_impl"
    ),
    "data.name": (
        "dataset_name dataset datasets dataset_dir dataset_path train_file data_path train_dataset"
    ),
    "data.subset": "dataset_config_name dataset_config",
    "data.split": "dataset_split dataset_train_split train_split",
    "data.eval_split": "dataset_test_split eval_dataset test_datasets validation_file",
    "data.text_field": "dataset_text_field text_column",
    "data.eval_fraction": "val_set_size val_size test_size validation_split_percentage",
    "data.seq_len": (
        "max_length max_seq_length max_seq_len sequence_len sequence_length cutoff_len block_size "
        "model_max_length"
    ),
    "data.packing": "sample_packing neat_packing packing_strategy packed padding_free",
    "data.too_long": "truncation_mode excess_length_strategy",
    "data.format": (
        "train_on_inputs train_on_input train_on_prompt mask_prompt assistant_only_loss "
        "completion_only_loss formatting type dataset_type conversation_style"
    ),
    "data.columns": "field_messages column_map message_property_mappings",
    "data.learn": "roles_to_train mask_history",
    "data.chat_template": "template chat_template_path chat_template_jinja",
    "adapter.type": "use_peft use_lora finetuning_type peft_type adapter_type",
    "adapter.r": "lora_r lora_rank rank",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.target_modules": (
        "lora_target_modules lora_target lora_target_linear lora_attn_modules apply_lora_to_mlp "
        "apply_lora_to_output lora_query lora_key lora_value lora_projection lora_mlp lora_head"
    ),
    "train.micro_batch_size": (
        "per_device_train_batch_size per_gpu_train_batch_size local_batch_size device_batch_size "
        "batch_size"
    ),
    "train.global_batch_size": "total_batch_size train_batch_size",
    "train.num_train_epochs": "num_epochs epochs max_epochs",
    "train.max_steps": "steps max_iters max_tokens max_samples max_steps_per_epoch",
    "train.precision": (
        "bf16 fp16 tf32 dtype torch_dtype compute_dtype pure_bf16 mixed_precision "
        "mixed_precision_param"
    ),
    "train.torch_compile": "compile",
    "train.deterministic": "full_determinism",
    "train.activation_checkpointing": (
        "gradient_checkpointing use_gradient_checkpointing enable_activation_checkpointing "
        "activation_offloading"
    ),
    "optim.learning_rate": "lr max_lr",
    "optim.lr_scheduler_kwargs": (
        "decay_steps num_decay_steps min_lr min_lr_rate min_lr_ratio cosine_min_lr_ratio num_cycles"
    ),
    "optim.lr_scheduler_type": "lr_scheduler scheduler decay_type",
    "optim.warmup_steps": "warmup_iters num_warmup_steps lr_warmup_steps",
    "optim.warmup_ratio": "warmup_fraction lr_warmup_fraction",
    "optim.adam_beta1": "beta1 betas",
    "optim.adam_beta2": "beta2",
    "optim.adam_epsilon": "eps adam_eps",
    "optim.max_grad_norm": "clip_grad_norm max_norm grad_clip gradient_clip_val gradient_clipping",
    "checkpoint.save_steps": (
        "save_interval interval save_strategy saves_per_epoch every_n_train_steps"
    ),
    "checkpoint.save_total_limit": "keep_latest_k save_top_k keep_last_n_checkpoints",
    "eval.eval_steps": (
        "eval_interval evaluation_strategy eval_strategy evals_per_epoch val_check_interval "
        "check_val_every_n_epoch run_val_every_n_steps"
    ),
    "eval.eval_samples": "max_eval_samples eval_iters limit_val_batches",
    "eval.keep_best": "load_best_model_at_end",
    "eval.patience": "early_stopping_patience early_stopping early_stop EarlyStoppingCallback",
    "eval.sample_tokens": "max_new_tokens generation_max_length",
    "log.logging_steps": "log_freq log_interval log_every_n_steps logging_strategy",
    "log.report_to": "metric_logger loggers use_wandb use_tensorboard use_trackio",
}
EXPORT = '"$TRAINSTACK_PYTHON" -m trainstack export RUN --to FOLDER'
LACKING = {  # what there is in place of a setting -> the names that other trainers have for one
    "it is derived from the batch sizes and the number of processes; remove it": (
        "gradient_accumulation_steps gradient_accumulation_iters accumulate_grad_batches world_size"
    ),
    "nodes and GPUs are set in train.slurm; remove it": (
        "num_nodes devices n_gpu num_processes nproc_per_node accelerator device device_map"
    ),
    "each GPU has the whole model (DDP); remove it": (
        "deepspeed fsdp fsdp_config fsdp_version zero_stage tensor_parallel_size strategy "
        "tensor_parallel_degree data_parallel_shard_degree pipeline_parallel_degree"
    ),
    "LoRA is the section adapter: write adapter: {type: lora}": "peft_config peft lora lora_config",
    "weights are not quantised here; remove it": (
        "load_in_4bit load_in_8bit use_qlora qlora quantization quantization_bit quantize "
        "bnb_4bit_quant_type bnb_4bit_compute_dtype bnb_4bit_use_double_quant bnb_config "
        "quantization_config"
    ),
    "of LoRA there is what section adapter has; remove it": (
        "use_dora peft_use_dora use_rslora peft_use_rslora lora_bias modules_to_save "
        "lora_modules_to_save layers_to_transform loraplus_lr_ratio init_lora_weights"
    ),
    "dropout of a model is in its config.json; that of LoRA is adapter.dropout": (
        "dropout attention_dropout hidden_dropout resid_pdrop"
    ),
    "write log.report_to: [wandb]; WANDB_PROJECT names the project, see doc/trackers.md": (
        "wandb tracker project WANDB_PROJECT wandb_project wandb_entity wandb_name wandb_run_id "
        "wandb_watch wandb_log_model wandb_mode"
    ),
    "the held-out loss decides, and lower is better: eval.keep_best, eval.patience; remove it": (
        "metric_for_best_model greater_is_better early_stopping_threshold min_delta metric metrics"
        " compute_metrics"
    ),
    f"a resume needs all of a checkpoint; the model alone: source env.sh; {EXPORT}": (
        "save_only_model save_safetensors"
    ),
    f"a finished model is pushed by: source env.sh; {EXPORT} --push ORG/NAME": (
        "push push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_always_push "
        "push_to_hub_model_id export_hub_model_id"
    ),
    f"an adapter is merged when it is exported: source env.sh; {EXPORT} --merge": (
        "merge merge_lora merge_adapter merge_and_unload"
    ),
    "a new run begins as a checkpoint of another by run.branch_from=RUN@STEP": (
        "adapter_name_or_path resume_from_adapter lora_model_dir"
    ),
    "a run resumes from its newest checkpoint: bash submit.sh --resume RUN": (
        "resume_from_checkpoint resume resume_from auto_resume_from_checkpoints ignore_data_skip "
        "ckpt_path"
    ),
    "an evaluation has the batches of train.micro_batch_size; remove it": (
        "per_device_eval_batch_size per_gpu_eval_batch_size eval_batch_size eval_sample_packing "
        "eval_accumulation_steps eval_packing"
    ),
    "eval.prompts are answered at each evaluation; remove it": (
        "predict_with_generate eval_table_size"
    ),
    "the optimizer is AdamW, and section optim has its settings; remove it": (
        "optim optimizer optim_args optim_target_modules"
    ),
    "tokens are made once (bash download_data_model.sh) and read from a file; remove it": (
        "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor num_workers "
        "dataset_num_proc preprocessing_num_workers dataset_prepared_path streaming shuffle "
        "tokenized_path overwrite_cache pad_to_sequence_len group_by_length dataloader_drop_last"
    ),
    "no code of a model's repository runs here; remove it": "trust_remote_code",
    "the tokenizer is the model's own; remove it": (
        "tokenizer tokenizer_name tokenizer_name_or_path tokenizer_type use_fast_tokenizer "
        "eos_token pad_token"
    ),
    "it is so without a setting, or there is no such thing here; remove it": (
        "do_train do_eval do_predict stage task_type eval_on_start eval_delay overwrite_output_dir "
        "include_num_input_tokens_seen include_tokens_per_second include_tokens_per_sec log_dir "
        "logging_dir logging_first_step log_peak_memory_stats plot_loss "
        "model_type architecture neftune_noise_alpha label_smoothing_factor use_liger_kernel "
        "torch_empty_cache_steps auto_find_batch_size freeze_layers unfrozen_parameters"
    ),
}
# another trainer's name -> the fix
OTHER_NAMES = {
    name: f"did you mean {ours}?" for ours, names in THEIRS.items() for name in names.split()
} | {name: fix for fix, names in LACKING.items() for name in names.split()}

FIRST_KEYS = {"adapter": "type", "model": "name", "data": "name", "run": "name"}  # of a section

FOLLOWS_THE_LOSS = "that one follows the loss, not the step"
OTHER_VALUES = {  # key=value as other trainers take it -> the fix
    "optim.lr_scheduler_type=wsd": "did you mean warmup_stable_decay?",
    "optim.lr_scheduler_type=one_cycle": "did you mean cosine_warmup_with_min_lr?",
    "optim.lr_scheduler_type=CosineAnnealingLR": "did you mean cosine?",
    "optim.lr_scheduler_type=reduce_lr_on_plateau": FOLLOWS_THE_LOSS,
    "optim.lr_scheduler_type=greedy": FOLLOWS_THE_LOSS,
    "adapter.type=qlora": "weights are not quantised here; write lora",
    "adapter.type=full": "write null if all weights shall learn",
    "log.report_to=all": "name them, as in [tensorboard, html]",
    "log.report_to=none": "write [], and metrics.jsonl alone is written",
    "checkpoint.save_steps=steps": "write how many steps",
    "checkpoint.save_steps=no": "a run always saves; write a large number",
    "checkpoint.save_steps=best": "eval.keep_best keeps the best one; write a number or auto",
    "eval.eval_steps=steps": "write how many steps",
}
