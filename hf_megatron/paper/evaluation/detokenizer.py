"""WikiText as people write: without the spaces around punctuation and the ``@`` marks inside numbers and compounds.

A model trained on ordinary text would be measured on its surprise at ``1 @,@ 000``. The number of tokens changes, and
so the perplexity is normalised by the number of the original ones.

Source: the detokenizer of the paper's code (Megatron-LM, tasks/zeroshot_gpt2), whose order of rules decides what comes
out: 270,330 GPT-2 tokens for the test set.
"""

from __future__ import annotations

import re

_NUMBERS_AND_COMPOUNDS = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
_PUNCTUATION = tuple((f" {mark} ", f"{mark} ") for mark in ":;.!?,")
# What stands between the two marks loses the spaces at its ends; nothing is nested.
_PAIRS = tuple(
    (re.compile(rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"), rf"{left}\1{right}")
    for left, right in ("()", "[]", "{}", '""', "''")
)
_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize_wikitext(text: str) -> str:
    """The text of a ``wiki.*.tokens`` file as it was before it was tokenised, as nearly as rules can tell."""
    text = _replaced(text, (("s '", "s'"), *_NUMBERS_AND_COMPOUNDS, *_PUNCTUATION))
    for pair, tight in _PAIRS:
        text = pair.sub(tight, text)
    return _replaced(text, _REST)


def _replaced(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for old, new in rules:
        text = text.replace(old, new)
    return text
