"""What can be imported without waiting for torch and transformers, and that the Auto classes learn of our models."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.repository import environment

_HEAVY = {"numpy", "safetensors", "torch", "transformers"}


def _run(program: str) -> set[str]:
    """The words that a program prints in a fresh interpreter."""
    return set(subprocess.check_output([sys.executable, "-c", program], env=environment(), text=True).split())


@pytest.mark.parametrize(
    "statement",
    [
        "import hf_megatron",
        "import hf_megatron.partition, hf_megatron.architectures, hf_megatron.checkpoint, hf_megatron.planning",
        "from hf_megatron_conversion import convert, inspect, verify",
    ],
)
def test_imports_are_light(statement: str) -> None:
    """Catches an import that makes every command, and every message about a wrong degree, wait for seconds."""
    assert not _HEAVY & _run(f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})")


_LOOK = "import hf_megatron, importlib.util; importlib.util.find_spec('transformers')"  # as accelerate and peft do


@pytest.mark.parametrize("first", ["import hf_megatron", "import transformers, hf_megatron", _LOOK])
def test_auto_classes_know_our_models(first: str) -> None:
    """Catches models that are registered in one order of the imports only, or not where somebody looked first."""
    program = (
        f"{first}; import transformers\n"
        "config = transformers.AutoConfig.for_model('megatron_gpt2', n_embd=8, n_head=1)\n"
        "print(type(transformers.AutoModel.from_config(config)).__name__)"
    )
    assert _run(program) == {"MegatronGPT2Model"}


@pytest.mark.parametrize("first", ["import hf_megatron, transformers", "import transformers, hf_megatron"])
def test_auto_classes_cost_no_models(first: str) -> None:
    """Catches an import that makes users of stock models wait for ours: the Auto classes take half as long without."""
    program = f"{first}, sys; from transformers import AutoModel, AutoTokenizer; print(*sys.modules)"
    modules = _run(program)
    assert "hf_megatron.models.gpt2.configuration_gpt2" in modules
    assert not {name for name in modules if name == "transformers.modeling_utils" or ".modeling_gpt2" in name}


_PICKLED = "pickle.loads(pickle.dumps(transformers.AutoConfig.for_model('megatron_gpt2', n_embd=8, n_head=1)))"


@pytest.mark.parametrize("known_by", ["unpickling", "the class", "its module"])
def test_models_are_known_with_their_configuration(tmp_path: Path, known_by: str) -> None:
    """Catches a configuration that comes from another process, or straight from its module, without its models."""
    file = tmp_path / "config"
    _run(f"import hf_megatron, pickle, transformers; open({str(file)!r}, 'wb').write(pickle.dumps({_PICKLED}))")
    config = {
        "unpickling": f"import pickle; config = pickle.load(open({str(file)!r}, 'rb'))",
        "the class": "import hf_megatron as m; config = m.MegatronGPT2Config(n_embd=8, n_head=1)",
        "its module": "import hf_megatron.models.gpt2.configuration_gpt2 as m; config = m.MegatronGPT2Config()",
    }[known_by]
    program = f"{config}\nimport transformers; print(transformers.AutoModel._model_mapping[type(config)].__name__)"
    assert _run(program) == {"MegatronGPT2Model"}


def test_a_failed_import_is_not_the_last(tmp_path: Path) -> None:
    """Catches a function that is called for an import that failed, or not for the one that succeeds after it."""
    (tmp_path / "package.py").write_text("import sys\nif sys.argv[1:] == []: raise OSError('not now')\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from hf_megatron.after_import import after_import\n"
        "after_import('package', lambda: print('called'))\n"
        "try: import package\nexcept OSError: print('failed')\n"
        "sys.argv.append('now'); import package; print(type(package.__loader__).__name__)"
    )
    assert _run(program) == {"failed", "called", "SourceFileLoader"}
