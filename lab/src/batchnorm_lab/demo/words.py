"""The words in the figures of the report, in Korean."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

KOREAN = {
    "plain": "정규화하지 않음",
    "normalized": "정규화함",
    "folded": "접어 넣음",
    "test accuracy": "테스트 정확도",
    "step (mini-batches of 60)": "스텝 (미니배치 60개)",
    "|mean| of z in a channel": "채널에서 z의 |평균|",
    "std of z in a channel": "채널에서 z의 표준편차",
    "layer": "층",
    "with mini-batch statistics": "미니배치 통계량으로",
    "with population statistics": "모집단 통계량으로",
    "class (filled: the right one)": "클래스 (채운 것이 정답)",
    "probability": "확률",
    "statistics of the mini-batch": "미니배치의 통계량",
    "statistics of the population, one sample": "모집단 통계량, 샘플 하나",
    "samples in the mini-batch": "미니배치의 샘플 수",
    "stored numbers": "저장된 수",
    "operations a sample": "샘플당 연산",
    "more than folded": "접어 넣은 것보다 많은 양",
    "logits of the normalized network": "정규화한 신경망의 로짓",
    "of the folded network": "접어 넣은 신경망의 로짓",
}
PATTERNS = (
    (re.compile(r"learning rate ([\d.]+) \((\d+)x\)"), r"학습률 \1 (\2배)"),
    (re.compile(r"one test sample: an? (\S+)"), r"테스트 샘플 하나: \1"),
)


def in_korean(text: str) -> str:
    """Translate one label; what is no word (a number, the name of a layer) stays.

    Parameters
    ----------
    text : str
        As the figures write it.

    Returns
    -------
    str
        In Korean.

    Examples
    --------
    >>> from batchnorm_lab.demo.words import in_korean
    >>> in_korean("learning rate 0.05 (1x)"), in_korean("0.5")
    ('학습률 0.05 (1배)', '0.5')
    """
    for pattern, wanted in PATTERNS:
        if pattern.fullmatch(text):
            return pattern.sub(wanted, text)
    return KOREAN.get(text, text)


TRANSLATORS: dict[str, Callable[[str], str]] = {"en": str, "ko": in_korean}


def in_figure(svg: str, translated: Callable[[str], str]) -> str:
    """Translate the labels of a figure whose text is kept as text.

    Parameters
    ----------
    svg : str
        The figure.
    translated : callable
        From a label to a label.

    Returns
    -------
    str
        The figure, with its labels replaced.
    """

    def replaced(found: re.Match[str]) -> str:
        return f">{html.escape(translated(html.unescape(found.group(1))), quote=False)}</text>"

    return re.sub(r">([^<>]+)</text>", replaced, svg)
