"""Articles of WikiText, or of any text in which " = Title = " begins one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["hold_out", "read_articles"]

_ARTICLE = re.compile(r"^(?= = [^=\n]+ = $)", re.MULTILINE)


def read_articles(files: Iterable[Path]) -> list[str]:
    """The articles of all files; what stands before the first title of a file is one too."""
    texts = (text for file in files for text in _ARTICLE.split(file.read_text(encoding="utf-8")))
    return [text for text in texts if text.strip()]


def hold_out(articles: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Articles to learn from and to be tested on: the latter at even distances, about this share, at least one."""
    count = max(1, round(share * len(articles)))
    chosen = {i * len(articles) // count for i in range(count)}
    return (
        [article for i, article in enumerate(articles) if i not in chosen],
        [articles[i] for i in sorted(chosen)],
    )
