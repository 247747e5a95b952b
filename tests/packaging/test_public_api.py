"""What a user can rely on importing."""

import hf_megatron
from tests.repository import ROOT

_BERT = [
    "MaskedLM",
    "MultipleChoice",
    "PreTraining",
    "QuestionAnswering",
    "SequenceClassification",
    "TokenClassification",
]
_GPT2 = ("ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification", "LMHeadModel", "Model")
PUBLIC = ["MegatronBertConfig", *(f"MegatronBertFor{task}" for task in _BERT), "MegatronBertModel"]
PUBLIC += ["MegatronGPT2Config", *(f"MegatronGPT2{name}" for name in _GPT2), "MegatronTrainer", "__version__"]


def test_public_names() -> None:
    """Catches a public name added, lost, renamed or exported in vain. Changing this list is changing the contract."""
    assert sorted(hf_megatron.__all__) == PUBLIC
    assert dir(hf_megatron) == PUBLIC
    for name in PUBLIC[:-1]:
        public = getattr(hf_megatron, name)
        assert public.__module__.startswith("hf_megatron.")
        # Under its public name transformers would take this class for its own MegatronBertConfig.
        assert public.__name__ == ("ParallelBertConfig" if name == "MegatronBertConfig" else name)


def test_one_version_everywhere() -> None:
    """Catches a release whose citation or changelog has another version; the source distribution's is tested there."""
    version = hf_megatron.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{version}] - 20" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
