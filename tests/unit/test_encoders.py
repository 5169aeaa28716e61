"""What a tokenizer's own post-processor puts around a text, for texts that are read in stretches."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, processors

from launch.data.encoders import TokenizerEncoder


@pytest.mark.parametrize("letters", ["ab", "no"], ids=["writes a", "cannot write a"])
@pytest.mark.parametrize(
    ("template", "ends"),
    [("[BOS] $A [EOS]", ([0], [1])), ("[BOS] $A", ([0], [])), ("$A [EOS] [EOS]", ([], [1, 1])), ("$A", ([], []))],
)
def test_what_stands_at_the_ends(
    tmp_path: Path, letters: str, template: str, ends: tuple[list[int], list[int]]
) -> None:
    tokens = ["[BOS]", "[EOS]", *letters]
    made = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    made.add_special_tokens(tokens[:2])
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("[BOS]", 0), ("[EOS]", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    assert TokenizerEncoder(str(tmp_path / "tokenizer.json")).at_the_ends() == ends
