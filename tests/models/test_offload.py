"""Models whose weights wait on the host or on disk, or lie on several devices: accelerate's hooks bring them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

import hf_megatron
from tests.models.reference import TINY, tiny_config, token_ids

_BERT = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "intermediate_size": 96,
}
_MODELS = {
    "GPT2LMHeadModel": "MegatronGPT2LMHeadModel",
    "GPT2ForSequenceClassification": "MegatronGPT2ForSequenceClassification",
    "MegatronBertForMaskedLM": "MegatronBertForMaskedLM",
    "MegatronBertForPreTraining": "MegatronBertForPreTraining",
}


def _cpu_offload(load: Callable[..., Any], folder: Path) -> Any:
    return accelerate.cpu_offload(load(), execution_device="cpu")


def _disk_offload(load: Callable[..., Any], folder: Path) -> Any:
    return accelerate.disk_offload(load(), folder, execution_device="cpu")


def _map_to(device: str) -> Callable[..., Any]:
    return lambda load, folder: load(device_map={"": device}, offload_folder=folder)


WAYS: dict[str, Callable[..., Any]] = {
    "cpu_offload": _cpu_offload,
    "disk_offload": _disk_offload,
    "device_map cpu": _map_to("cpu"),
    "device_map disk": _map_to("disk"),
    "device_map auto": lambda load, folder: load(device_map="auto", offload_folder=folder),
}
GPU_WAYS: dict[str, Callable[..., Any]] = {
    "cpu_offload": lambda load, folder: accelerate.cpu_offload(load(), execution_device=0),
    "device_map auto": WAYS["device_map auto"],
    "little memory": lambda load, folder: load(
        device_map="auto", max_memory={0: "150KB", "cpu": "1GB"}, offload_folder=folder
    ),
    "half a GPU": lambda load, folder: load(
        device_map="auto", max_memory={0: "150KB", 1: "1GB", "cpu": "1GB"}, offload_folder=folder
    ),
}


def _stored(directory: Path, name: str, is_tied: bool) -> Path:
    stock = getattr(transformers, name)
    if name.startswith("GPT2"):
        config = tiny_config(tie_word_embeddings=is_tied, pad_token_id=0, **{"attn_pdrop": 0.0, "resid_pdrop": 0.0})
    else:
        config = stock.config_class(**_BERT, tie_word_embeddings=is_tied, hidden_dropout_prob=0.0)
        config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    stock(config).save_pretrained(directory)
    return directory


def _outputs(model: Any, name: str, *, training: bool) -> tuple[torch.Tensor, ...]:
    """What the model gives; in training the loss, through which a backward pass goes."""
    ids = token_ids(2, 9)
    labels = torch.tensor([0, 1]) if "Classification" in name else ids
    if not training:
        with torch.no_grad():
            return tuple(model.eval()(input_ids=ids, return_dict=False))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    order = {"next_sentence_label": torch.tensor([0, 1])} if "PreTraining" in name else {}
    loss = model.train()(input_ids=ids, labels=labels, **order).loss
    loss.backward()
    return (loss.detach(),)


def _compare(directory: Path, folder: Path, name: str, way: Callable[..., Any]) -> None:
    stock = getattr(transformers, name)
    ours = getattr(hf_megatron, _MODELS[name])
    for training in (False, True):
        model = stock.from_pretrained(directory)
        if name == "GPT2LMHeadModel":
            model.loss_type = "ForCausalLM"  # the mean over the tokens that are predicted
        expected = _outputs(model, name, training=training)
        made = way(lambda **options: ours.from_pretrained(directory, **options), folder / str(training))
        for actual, wanted in zip(_outputs(made, name, training=training), expected, strict=True):
            if isinstance(wanted, torch.Tensor):
                torch.testing.assert_close(actual.cpu(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", _MODELS)
def test_weights_that_wait_elsewhere_give_stocks_numbers(tmp_path: Path, name: str, way: str, is_tied: bool) -> None:
    """Catches weights that are read where no hook has brought them: NaN, or numbers of empty memory."""
    directory = _stored(tmp_path / "model", name, is_tied)
    _compare(directory, tmp_path / "offload", name, WAYS[way])


@pytest.mark.gpu
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("way", GPU_WAYS)
@pytest.mark.parametrize("name", _MODELS)
def test_weights_on_a_gpu_or_two(tmp_path: Path, name: str, way: str, is_tied: bool) -> None:
    """Catches a head that copies the embedding from another GPU, or meets its hidden states on the wrong one."""
    if way == "half a GPU" and torch.cuda.device_count() < 2:
        pytest.skip("takes two GPUs")
    directory = _stored(tmp_path / "model", name, is_tied)
    _compare(directory, tmp_path / "offload", name, GPU_WAYS[way])


def test_a_tied_head_asks_the_embedding_for_its_weight(tmp_path: Path) -> None:
    """Catches a head that holds on to the weight, or is handed it as a tensor, which a hook would copy every time."""
    directory = _stored(tmp_path / "model", "GPT2LMHeadModel", True)
    model = accelerate.cpu_offload(
        hf_megatron.MegatronGPT2LMHeadModel.from_pretrained(directory), execution_device="cpu"
    )
    given: list[Any] = []
    model.lm_head.register_forward_pre_hook(
        lambda module, args, kwargs: given.extend([*args, *kwargs.values()]), with_kwargs=True
    )
    model(input_ids=token_ids(2, 9))
    sizes = [value.numel() for value in given if isinstance(value, torch.Tensor)]
    assert sizes == [2 * 9 * TINY["n_embd"]]
    assert model.transformer.wte.weight.is_meta
