"""Every private name of other libraries that this package overrides, calls or reads, and what breaks when it changes.

Nothing promises that these stay. ``tests/packaging/test_private_interfaces.py`` checks each against what is installed,
and searches the source for names that are missing here.
"""

from __future__ import annotations

from typing import NamedTuple


class PrivateInterface(NamedTuple):
    """One private name.

    Attributes:
        owner: Where it is: a module or class that has it, or a function whose code sets or reads it.
        name: The name.
        breaks: What stops working, or changes, without it.
        parameters: The arguments of a function, as far as this package relies on them; None for anything else. Newer
            versions may add further ones behind.
    """

    owner: str
    name: str
    breaks: str
    parameters: tuple[str, ...] | None = None


_MODEL = "transformers.modeling_utils.PreTrainedModel"
_TRAINER = "transformers.trainer.Trainer"

PRIVATE_INTERFACES: tuple[PrivateInterface, ...] = (
    # transformers: building, loading and saving
    PrivateInterface(
        _MODEL,
        "_from_config",
        "from_config with distributed_config and seed, which the Auto classes call as well",
        ("config",),
    ),
    PrivateInterface(
        _MODEL,
        "_load_pretrained_model",
        "reading checkpoints by slices and under any spelling",
        ("model", "state_dict", "checkpoint_files", "load_config", "expected_keys"),
    ),
    PrivateInterface(
        _MODEL,
        "_load_and_finalize_distributed_pretrained_model",
        "reading tp directories, and refusing incomplete ones",
        ("self", "distributed_checkpoint_dir", "device_map", "device_mesh"),
    ),
    PrivateInterface(
        _MODEL,
        "_finalize_model_loading",
        "drawing what a tp directory does not hold",
        ("model", "load_config", "loading_info"),
    ),
    PrivateInterface(_MODEL, "_init_weights", "initial weights that do not depend on the layout", ("self", "module")),
    PrivateInterface(
        "transformers.core_model_loading.set_param_for_module",
        "_is_hf_initialized",
        "telling loaded weights from those to draw: loaded ones would be drawn anew",
    ),
    PrivateInterface(
        "transformers.distributed.checkpoint",
        "_save_model_checkpoint_distributed",
        "saving a whole model as a tp directory",
        ("model", "checkpoint_dir"),
    ),
    PrivateInterface(
        "transformers.distributed.checkpoint",
        "_redistribute_state_dict",
        "loading an optimizer's state, whose entries are loaded as weights only",
        ("state_dict", "reference_state_dict"),
    ),
    PrivateInterface(
        _MODEL,
        "_get_resized_lm_head",
        "resizing the vocabulary of a model with an untied head",
        ("self", "old_lm_head", "new_num_tokens", "transposed", "mean_resizing"),
    ),
    PrivateInterface(
        "transformers.distributed.mixin.DistributedMixin",
        "_tp_plan",
        "cutting the heads: each class has the plan of its own",
    ),
    PrivateInterface(
        "transformers.distributed.mixin.DistributedMixin",
        "_mesh_manager",
        "joining the data-parallel ranks of an adapter",
    ),
    # transformers: what the models say of themselves, and what is asked of them
    PrivateInterface(
        _MODEL,
        "_upload_modified_files",
        "push_to_hub once the directory is complete",
        ("self", "working_dir", "repo_id", "files_timestamps", "commit_message", "token", "create_pr"),
    ),
    PrivateInterface(
        _MODEL,
        "_get_files_timestamps",
        "push_to_hub of what was saved, and not what lay there",
        ("self", "working_dir"),
    ),
    PrivateInterface(_MODEL, "_tied_weights_keys", "tied heads without a parameter of their own"),
    PrivateInterface(
        "accelerate.hooks.remove_hook_from_module", "_hf_hook", "tied heads where accelerate offloads the embedding"
    ),
    PrivateInterface(_MODEL, "_no_split_modules", "FSDP2 and device maps that take a layer as one"),
    PrivateInterface(_MODEL, "_can_record_outputs", "output_attentions and output_hidden_states"),
    PrivateInterface(_MODEL, "_supports_flex_attn", "refusing flex attention for BERT"),
    PrivateInterface(
        _MODEL, "_can_set_attn_implementation", "set_attn_implementation, which continuous batching calls", ()
    ),
    PrivateInterface(
        "transformers.configuration_utils.PreTrainedConfig", "_attn_implementation", "choosing the attention kernel"
    ),
    PrivateInterface(f"{_MODEL}.loss_function", "_loss_function", "losses of a user's own: model.loss_function = ..."),
    PrivateInterface(
        "transformers.modeling_layers.GradientCheckpointingLayer.__init_subclass__",
        "_gradient_checkpointing_func",
        "selective recomputation",
    ),
    PrivateInterface(
        "transformers.generation.utils.GenerationMixin",
        "_get_stopping_criteria",
        "ranks that stop generating together, at max_time or by criteria of the caller's",
        ("self",),
    ),
    # transformers: Trainer
    PrivateInterface(
        _TRAINER,
        "_get_dataloader",
        "streams that every layout reads alike",
        ("self", "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"),
    ),
    PrivateInterface(
        _TRAINER, "_get_train_sampler", "group_by_length with the same order at every layout", ("self", "train_dataset")
    ),
    PrivateInterface(
        _TRAINER,
        "_init_training_state",
        "finding the place in a stream when a run is resumed, and comparing the number of steps over ranks",
        ("self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"),
    ),
    PrivateInterface(
        _TRAINER, "_track_num_input_tokens", "counting the tokens of a tensor-parallel group once", ("self", "inputs")
    ),
    PrivateInterface(
        _TRAINER, "_get_grad_norm", "ending a run before inf or nan reaches the weights", ("self", "model", "grad_norm")
    ),
    PrivateInterface(
        _TRAINER,
        "_save_checkpoint",
        "checkpoints with optimizer state that resume at any layout",
        ("self", "model", "trial"),
    ),
    PrivateInterface(
        _TRAINER, "_get_output_dir", "the place of checkpoints, in a search for hyper-parameters too", ("self", "trial")
    ),
    PrivateInterface(
        _TRAINER,
        "_get_num_items_in_batch",
        "noticing a stream that ends earlier on one rank",
        ("self", "batch_samples", "device"),
    ),
    PrivateInterface(
        _TRAINER, "_maybe_log_save_evaluate", "doing on all ranks what a callback of one of them asks for", ("self",)
    ),
    PrivateInterface(_TRAINER, "_save_scaler", "the loss scale in checkpoints", ("self", "output_dir")),
    PrivateInterface(_TRAINER, "_load_scaler", "the loss scale of a resumed run", ("self", "checkpoint")),
    PrivateInterface(_TRAINER, "_push_from_checkpoint", "hub_strategy", ("self", "checkpoint_folder")),
    PrivateInterface(
        _TRAINER,
        "_load_from_checkpoint",
        "resuming the weights, each rank reading its slices",
        ("self", "resume_from_checkpoint", "model"),
    ),
    PrivateInterface(_TRAINER, "_load_best_model", "load_best_model_at_end", ("self",)),
    PrivateInterface(
        _TRAINER,
        "_load_optimizer_and_scheduler",
        "resuming optimizer and scheduler at another layout",
        ("self", "checkpoint"),
    ),
    PrivateInterface(_TRAINER, "_load_rng_state", "resuming the random stream", ("self", "checkpoint")),
    # accelerate, peft, evaluate
    PrivateInterface(
        "accelerate.parallelism_config.ParallelismConfig",
        "_validate_accelerator",
        "training with tensor parallelism on CPUs",
        ("self", "accelerator"),
    ),
    PrivateInterface(
        "peft.peft_model.PeftModel",
        "_get_base_model_class",
        "the base model that an adapter's file names",
        ("self", "is_prompt_tuning"),
    ),
    PrivateInterface("peft.LoraConfig", "_register_custom_module", "LoRA on parallel layers", ("self", "mapping")),
    PrivateInterface(
        "peft.tuners.lora.layer.LoraLayer", "_get_in_out_features", "LoRA on parallel layers", ("self", "module")
    ),
    PrivateInterface(
        "peft.tuners.lora.layer.LoraLayer.reset_lora_parameters",
        "_hf_tp_plan",
        "refusing plain peft, which takes a parallel layer for a stock one",
    ),
    PrivateInterface("evaluate.module.EvaluationModule", "_info", "the metrics as modules of evaluate", ("self",)),
    PrivateInterface(
        "evaluate.module.EvaluationModule",
        "_compute",
        "the metrics as modules of evaluate",
        ("self", "predictions", "references"),
    ),
    # torch
    PrivateInterface("torch.nn.Module.__init__", "_parameters", "replacing parameters by DTensors, one by one"),
    PrivateInterface("torch.distributed.tensor.placement_types", "_StridedShard", "the cut of the fused Q, K and V"),
    PrivateInterface(
        "torch.distributed.distributed_c10d", "_world", "giving up on a rank that does not come: the list of groups"
    ),
    PrivateInterface(
        "torch.distributed.distributed_c10d",
        "_set_pg_timeout",
        "giving up on a rank that does not come after ddp_timeout",
        ("timeout", "group"),
    ),
    PrivateInterface(
        "torch._C._autograd",
        "_get_current_graph_task_keep_graph",
        "retain_graph=True in a backward pass through the fused loss, whose gradients must then stay as they are",
    ),
    PrivateInterface("torch._C", "_autograd", "where the name above is"),
    PrivateInterface(
        "torch.amp.grad_scaler.GradScaler",
        "_unscale_grads_",
        "float16: a step that all ranks skip when one overflows",
        ("self", "optimizer"),
    ),
    PrivateInterface("torch", "_assert_async", "refusing token ids and labels out of range on a GPU"),
    PrivateInterface("torch.Tensor", "_use_count", "waiting until gloo has let go of a tensor"),
    PrivateInterface("torch", "_C", "telling whether a graph is kept for another backward pass"),
    PrivateInterface("torch", "_utils", "writing Megatron-LM's files"),
    PrivateInterface("torch._utils", "_rebuild_tensor_v2", "writing Megatron-LM's files"),
    # Python, numpy
    PrivateInterface("pickle", "_compat_pickle", "reading protocol 2's names, which are those of Python 2"),
    PrivateInterface(
        "numpy", "_core", "resuming the random stream: the name in the allow list of the pickle that holds it"
    ),
    PrivateInterface(
        "numpy._core.multiarray",
        "_reconstruct",
        "resuming the random stream: the name in the allow list of the pickle that holds it",
    ),
)
