"""What this package relies on in transformers and torch beyond their private names, and what breaks when it changes.

The private names are in ``hf_megatron/private_interfaces.py``. A failure here after an upgrade is the list of what to
look at; the other tests of the models then say whether the change matters.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import _hf_utils
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.checkpoint import is_sharded_checkpoint
from transformers.distributed.mixin import DistributedMixin
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.distributed.tensor_parallel import TensorParallelLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, LoadStateDictConfig
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hf_megatron import MegatronGPT2LMHeadModel
from hf_megatron.checkpoint.sharded import SHARDING_INFO, is_shard
from hf_megatron.models.forward_arguments import CACHE
from tests.models.architectures import GPT2, POST, ModelCase, StockDir

# Newer versions may add arguments behind those named here. CACHE is what this transformers calls the key-value cache.
SIGNATURES: list[tuple[Callable[..., Any], str, str]] = [
    (PreTrainedModel.prepare_distribute_model, "distributed_config device_map", "refusing layouts before reading"),
    (PreTrainedModel.maybe_distribute_model, "model distributed_config mesh_manager", "groups and one random state"),
    (
        PreTrainedModel.save_distributed_checkpoint,
        "self model_to_save save_directory push_to_hub save_on_this_rank",
        "saving a whole model as a tp directory",
    ),
    (
        PreTrainedModel.gather_sharded_state_dict_for_save,
        "self model_to_save state_dict distributed_config save_on_this_rank",
        "gathering one tensor at a time, on the rank that writes",
    ),
    (
        PreTrainedModel.activation_checkpointing_enable,
        "self activation_checkpointing_kwargs every_n_layers offload",
        "selective recomputation",
    ),
    (DtensorShardOperation.__init__, "self param", "drawing a rank's part of a new weight"),
    (DtensorShardOperation.shard_tensor, "self source tensor_idx device dtype", "drawing or reading a rank's part"),
    (TensorParallelLayer.shard_param, "self module param mesh", "cutting parameters"),
    (TensorParallelLayer.install_forward, "self module mesh", "handing modules their group"),
    (ALL_ATTENTION_FUNCTIONS.get_interface, "attn_implementation default", "choosing an attention kernel"),
    (OutputRecorder.__init__, "self target_class index layer_name", "output_attentions"),
    (capture_outputs, "func", "output_hidden_states and output_attentions of our base models"),
    (merge_with_config_defaults, "func", "use_cache of our base models"),
    (create_causal_mask, f"config inputs_embeds attention_mask {CACHE} position_ids", "the mask of our base models"),
]


@pytest.mark.parametrize(("function", "names", "use"), SIGNATURES, ids=lambda value: getattr(value, "__qualname__", ""))
def test_signatures(function: Callable[..., Any], names: str, use: str) -> None:
    """Catches an argument added, renamed or moved in front of ours."""
    found = list(inspect.signature(function).parameters)
    wanted = names.split()
    found = [name for name in found if name in wanted or found.index(name) < len(wanted)]
    assert found == wanted, f"{function.__qualname__} changed; it serves {use}"


@pytest.mark.parametrize("head", ["main", "Model"])
@pytest.mark.parametrize("case", [GPT2, POST])
def test_our_forward_takes_what_the_stock_one_takes(case: ModelCase, head: str) -> None:
    """Catches an argument of a newer stock forward that ours does not have, in this order."""
    ours, stock = (get(head if head == "Model" else case.language_model) for get in (case.ours, case.stock))
    source = inspect.getsourcefile(ours)
    written = inspect.unwrap(ours.forward, stop=lambda function: function.__code__.co_filename == source)
    names = [CACHE if name == "past_key_values" else name for name in inspect.signature(written).parameters]
    expected = list(inspect.signature(inspect.unwrap(stock.forward)).parameters)
    assert [name for name in names if name != "region"] == expected


def test_loading_hands_over_what_loader_overrides_need(stock_dir: StockDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches from_pretrained loading by another way than `_load_pretrained_model`, or returning something else."""
    seen: list[Any] = []
    original = MegatronGPT2LMHeadModel._load_pretrained_model

    def recording(*args: Any) -> Any:
        seen.extend((*args[:4], original(*args)))
        return seen[-1]

    monkeypatch.setattr(MegatronGPT2LMHeadModel, "_load_pretrained_model", staticmethod(recording))
    MegatronGPT2LMHeadModel.from_pretrained(stock_dir())
    model, state_dict, files, load_config, (info, _offload) = seen
    assert isinstance(model, MegatronGPT2LMHeadModel)
    assert state_dict is None
    assert [Path(file).name for file in files] == ["model.safetensors"]
    assert isinstance(load_config, LoadStateDictConfig)
    assert isinstance(info.missing_keys, set)
    assert isinstance(info.mismatched_keys, set)
    assert next(iter(model.parameters()))._is_hf_initialized, "loaded weights would be drawn anew"


def test_auto_from_config_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `AutoModel...from_config` not going through `_from_config` any more."""
    monkeypatch.setattr(MegatronGPT2LMHeadModel, "_from_config", lambda config, **options: options)
    options = {"distributed_config": DistributedConfig(tp_size=2), "seed": 1}
    assert AutoModelForCausalLM.from_config(GPT2.config(), **options).items() >= options.items()


def test_layers_hand_themselves_to_the_checkpointing_function() -> None:
    """Catches layers checkpointed by another function, or not as one: selective recomputation replaces it."""
    model = MegatronGPT2LMHeadModel(GPT2.config()).train()
    model.activation_checkpointing_enable()
    layer, seen = model.transformer.h[0], []
    assert isinstance(layer, GradientCheckpointingLayer)
    layer._gradient_checkpointing_func = lambda forward, *args: seen.append((forward, args))
    hidden_states = torch.ones(1, 3, 48)
    layer(hidden_states, None)
    ((forward, args),) = seen
    assert forward(*args).shape == hidden_states.shape


def test_the_mixin_marks_models_it_cut() -> None:
    """Catches the property renamed that tells whether saving takes all ranks."""
    assert isinstance(DistributedMixin.is_distributed_loading_by_transformers, property)
    assert not MegatronGPT2LMHeadModel(GPT2.config()).is_distributed_loading_by_transformers


def test_the_format_of_tp_directories(stock_dir: StockDir, tmp_path: Path) -> None:
    """Catches another name or other metadata for the files of a distributed checkpoint."""
    assert _hf_utils.CUSTOM_METADATA_KEY == SHARDING_INFO
    assert _hf_utils.SAVED_OFFSETS_KEY == "saved_offsets"
    MegatronGPT2LMHeadModel.from_pretrained(stock_dir()).save_pretrained(tmp_path, distributed_checkpoint=True)
    (shard,) = tmp_path.glob("*.safetensors")
    assert is_shard(shard)
    assert is_sharded_checkpoint(tmp_path)
    content = shard.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    offsets = json.loads(header["__metadata__"][SHARDING_INFO])
    assert offsets["transformer.h.0.attn.c_attn.weight"]["saved_offsets"] == [0, 0]
