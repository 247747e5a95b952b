"""Every private name of other libraries that this package overrides, calls or reads, and what breaks when it changes.

Nothing promises that these stay. ``tests/packaging/test_private_interfaces.py`` checks each against what is installed,
and searches the source for names that are missing here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class PrivateInterface(NamedTuple):
    """One private name."""

    owner: str  # a module or class that has it, or a function whose code sets or reads it
    name: str
    breaks: str  # what stops working, or changes, without it
    # The arguments of a function that this package relies on, if any; newer versions may add further ones behind.
    parameters: tuple[str, ...]


_MODEL = "transformers.modeling_utils.PreTrainedModel"
_DISTRIBUTED = "transformers.distributed.mixin.DistributedMixin"
_TRAINER = "transformers.trainer.Trainer"
_LORA = "peft.tuners.lora.layer.LoraLayer"
_C10D = "torch.distributed.distributed_c10d"
_SYMMETRIC = "torch.distributed._symmetric_memory"
_METRIC = "evaluate.module.EvaluationModule"

# owner.name(parameters): what breaks
_TABLE: Mapping[str, str] = {
    # transformers: building, loading and saving
    f"{_MODEL}._from_config(config)": "from_config with distributed_config and seed, also from the Auto classes",
    f"{_MODEL}._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)": (
        "reading checkpoints by slices and under any spelling"
    ),
    "transformers.modeling_utils._is_on_hf_mount(path)": "reading files where a mapping may hang",
    f"{_MODEL}._load_and_finalize_distributed_pretrained_model"
    "(self, distributed_checkpoint_dir, device_map, device_mesh)": (
        "reading tp directories, and refusing incomplete ones"
    ),
    f"{_MODEL}._finalize_model_loading(model, load_config, loading_info)": "drawing what a tp directory does not hold",
    f"{_MODEL}._init_weights(self, module)": "initial weights that do not depend on the layout",
    "transformers.core_model_loading.set_param_for_module._is_hf_initialized": "drawing no loaded weights anew",
    "transformers.distributed.checkpoint._save_model_checkpoint_distributed(model, checkpoint_dir)": (
        "saving a whole model as a tp directory"
    ),
    "transformers.distributed.checkpoint._redistribute_state_dict(state_dict, reference_state_dict)": (
        "loading an optimizer's state, whose entries are loaded as weights only"
    ),
    f"{_MODEL}._get_resized_lm_head(self, old_lm_head, new_num_tokens, transposed, mean_resizing)": (
        "resizing the vocabulary of a model with an untied head"
    ),
    f"{_DISTRIBUTED}._tp_plan": "cutting the heads: each class has the plan of its own",
    f"{_DISTRIBUTED}._mesh_manager": "joining the data-parallel ranks of an adapter",
    # transformers: what the models say of themselves, and what is asked of them
    f"{_MODEL}._upload_modified_files"
    "(self, working_dir, repo_id, files_timestamps, commit_message, token, create_pr)": (
        "push_to_hub once the directory is complete"
    ),
    f"{_MODEL}._get_files_timestamps(self, working_dir)": "push_to_hub of what was saved, and not what lay there",
    f"{_MODEL}._tied_weights_keys": "tied heads without a parameter of their own",
    "accelerate.hooks.remove_hook_from_module._hf_hook": "tied heads where accelerate offloads the embedding",
    f"{_MODEL}._no_split_modules": "FSDP2 and device maps that take a layer as one",
    f"{_MODEL}._can_record_outputs": "output_attentions and output_hidden_states",
    "transformers.models.bert.modeling_bert.BertModel._create_attention_masks"
    "(self, attention_mask, encoder_attention_mask, embedding_output)": "masks that an accelerator is not waited for",
    f"{_MODEL}._supports_flex_attn": "refusing flex attention for BERT",
    f"{_MODEL}._can_set_attn_implementation": "set_attn_implementation, which continuous batching calls",
    "transformers.configuration_utils.PreTrainedConfig._attn_implementation": "choosing the attention kernel",
    f"{_MODEL}.loss_function._loss_function": "losses of a user's own: model.loss_function = ...",
    "transformers.modeling_layers.GradientCheckpointingLayer.__init_subclass__._gradient_checkpointing_func": (
        "selective recomputation"
    ),
    "transformers.generation.utils.GenerationMixin._get_stopping_criteria(self)": "ranks that stop generating together",
    # transformers: Trainer
    f"{_TRAINER}._get_dataloader(self, dataset, description, batch_size, sampler_fn, is_training, dataloader_key)": (
        "streams that every layout reads alike"
    ),
    f"{_TRAINER}._get_train_sampler(self, train_dataset)": "group_by_length with the same order at every layout",
    f"{_TRAINER}._init_training_state"
    "(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)": (
        "finding the place in a stream when a run is resumed, and comparing the number of steps over ranks"
    ),
    f"{_TRAINER}._track_num_input_tokens(self, inputs)": "counting the tokens of a tensor-parallel group once",
    f"{_TRAINER}._clip_grad_norm(self, model)": "clipping on shards",
    f"{_TRAINER}._run_epoch._tr_loss": "leaving out losses that are not finite without waiting for an accelerator",
    f"{_TRAINER}._run_epoch._globalstep_last_logged": "the same",
    f"{_TRAINER}._get_grad_norm(self, model, grad_norm)": "ending a run before inf or nan reaches the weights",
    f"{_TRAINER}._save_checkpoint(self, model, trial)": "checkpoints with optimizer state that resume at any layout",
    f"{_TRAINER}._finalize_training(self)": "waiting for the last checkpoint that is written in the background",
    f"{_TRAINER}._get_output_dir(self, trial)": "the place of checkpoints, in a search for hyper-parameters too",
    f"{_TRAINER}._get_num_items_in_batch(self, batch_samples, device)": "noticing a stream that ends early on one rank",
    f"{_TRAINER}._maybe_log_save_evaluate(self)": "doing on all ranks what a callback of one of them asks for",
    f"{_TRAINER}._save_scaler(self, output_dir)": "the loss scale in checkpoints",
    f"{_TRAINER}._load_scaler(self, checkpoint)": "the loss scale of a resumed run",
    f"{_TRAINER}._push_from_checkpoint(self, checkpoint_folder)": "hub_strategy",
    f"{_TRAINER}._load_from_checkpoint(self, resume_from_checkpoint, model)": "resuming weights, each rank its slices",
    f"{_TRAINER}._load_best_model(self)": "load_best_model_at_end",
    f"{_TRAINER}._load_optimizer_and_scheduler(self, checkpoint)": "resuming optimizer and scheduler at another layout",
    f"{_TRAINER}._load_rng_state(self, checkpoint)": "resuming the random stream",
    # accelerate, peft, evaluate
    "accelerate.parallelism_config.ParallelismConfig._validate_accelerator(self, accelerator)": (
        "training with tensor parallelism on CPUs"
    ),
    "peft.peft_model.PeftModel._get_base_model_class(self, is_prompt_tuning)": "the base model in an adapter's file",
    "peft.LoraConfig._register_custom_module(self, mapping)": "LoRA on parallel layers",
    f"{_LORA}._get_in_out_features(self, module)": "LoRA on parallel layers",
    f"{_LORA}.reset_lora_parameters._hf_tp_plan": "refusing plain peft, which takes a parallel layer for a stock one",
    f"{_METRIC}._info(self)": "the metrics as modules of evaluate",
    f"{_METRIC}._compute(self, predictions, references)": "the metrics as modules of evaluate",
    # torch
    "torch.nn.Module.register_parameter._parameters": "replacing parameters by DTensors, one by one",
    "torch.distributed.tensor.DTensor._local_tensor": "layers, steps and clipping on shards, past DTensor's dispatcher",
    "torch.distributed.tensor.DTensor._spec": "gradients of shards as gradients of DTensors",
    "torch.optim.adam.Adam.__init__._step_supports_amp_scaling": "skipping a step on a GPU before anybody looks",
    "torch._foreach_norm": "clipping on shards",
    "torch._foreach_mul_": "clipping on shards",
    "torch._C._ForceDispatchKeyGuard": "dropout of fused attention in compiled models on several ranks",
    "torch._C._dispatch_tls_local_include_set": "the same",
    f"{_SYMMETRIC}._fused_all_gather_matmul.fused_all_gather_matmul": "products over symmetric memory",
    f"{_SYMMETRIC}._fused_matmul_reduce_scatter.fused_matmul_reduce_scatter": "products over symmetric memory",
    "torch.distributed.tensor.placement_types._StridedShard": "the cut of the fused Q, K and V",
    f"{_C10D}._world": "giving up on a rank that does not come: the list of groups",
    f"{_C10D}._set_pg_timeout(timeout, group)": "giving up on a rank that does not come after ddp_timeout",
    "torch._C._autograd._get_current_graph_task_keep_graph": "retain_graph=True through the fused head and loss",
    "torch._C._autograd": "where the name above is",
    "torch.amp.grad_scaler.GradScaler._unscale_grads_(self, optimizer)": "float16: a step that all ranks skip together",
    "torch._assert_async": "refusing token ids and labels out of range on a GPU",
    "torch.Tensor._use_count": "waiting until gloo has let go of a tensor",
    "torch._C": "telling whether a graph is kept for another backward pass",
    "torch._utils": "writing Megatron-LM's files",
    "torch._utils._rebuild_tensor_v2": "writing Megatron-LM's files",
    # datasets, Python, numpy
    "datasets.arrow_dataset.Dataset.__init__._fingerprint": "going on with tokenizing the same data set",
    "os._exit": "ending a tokenizer's worker whose parent is gone",
    "pickle._compat_pickle": "reading protocol 2's names, which are those of Python 2",
    "numpy._core": "resuming the random stream: in the allow list of its pickle",
    "numpy._core.multiarray._reconstruct": "resuming the random stream: in the allow list of its pickle",
}


def _interface(path: str, breaks: str) -> PrivateInterface:
    dotted, _, parameters = path.removesuffix(")").partition("(")
    owner, _, name = dotted.rpartition(".")
    return PrivateInterface(owner, name, breaks, tuple(parameters.split(", ")) if parameters else ())


PRIVATE_INTERFACES = tuple(_interface(path, breaks) for path, breaks in _TABLE.items())
