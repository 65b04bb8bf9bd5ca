"""The five attributes' names, and what the command needs to know them."""

from __future__ import annotations

import subprocess
import sys

from pyiqa_clipkd.attributes.names import ATTRIBUTES, WORDS


def test_they_are_those_of_spaq_and_have_words_for_both_sides() -> None:
    assert set(ATTRIBUTES) == {
        *('sharpness', 'brightness', 'contrast', 'colorfulness', 'noisiness')
    }
    assert tuple(WORDS) == ATTRIBUTES
    words = [word for pair in WORDS.values() for word in pair]
    assert len(set(words)) == 10
    assert WORDS['noisiness'] == ('noisy', 'clean')  # 1 is free of noise


def test_the_command_imports_nothing_heavy() -> None:
    code = (
        'import sys, pyiqa_clipkd.attributes.command\n'
        "heavy = {'torch', 'timm', 'pyiqa', 'scipy', 'pywt', 'pandas', 'skimage'}\n"
        'print(sorted(heavy & set(sys.modules)))'
    )
    command = [sys.executable, '-c', code]
    assert subprocess.check_output(command, text=True).strip() == '[]'
