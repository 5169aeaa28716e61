"""Reading texts to be prepared: in blocks of about one size, from any of which reading can start, or not at all."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.data import text_inputs
from launch.data.text_inputs import BadInput, Block, blocks
from tests.unit.prepared_texts import texts, written

pytestmark = pytest.mark.usefixtures("small_blocks")


def test_rows_of_parquet_are_parted_by_their_bytes(tmp_path: Path) -> None:
    """Whatever a row holds, a block holds little more than one block's bytes, and reading can start at each."""
    rows = ["a" * size if size % 3 else None for size in (1, 3000, 10, 0, 2500, 700, 800, 600, 5, 2000, 4000, 2)]
    pq.write_table(pa.table({"body": pa.array(rows, pa.string())}), tmp_path / "in.parquet", row_group_size=9)
    found = list(blocks(tmp_path / "in.parquet", "body"))
    assert [text for block in found for text in block.content] == [row and row.encode() for row in rows]
    assert len(found) > 5
    for block in found:
        assert sum(len(text or "") for text in block.content[:-1]) < text_inputs.BLOCK_BYTES  # type: ignore[misc]


def test_a_line_longer_than_a_block_is_not_cut_inside_a_character(tmp_path: Path, tokenizer: Path) -> None:
    for shift in range(4):
        text = "a" * shift + "猫🐈" * 3000
        (tmp_path / "long.txt").write_text(text)
        pieces = [block.content for block in blocks(tmp_path / "long.txt", "text")]
        assert b"".join(pieces).decode() == text and len(pieces) > 3  # type: ignore[arg-type]
        assert all(piece.decode() for piece in pieces)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt"])
def test_reading_goes_on_at_any_block(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "in.txt"
    if kind == "txt":
        path.write_text("".join(texts(90)) + "猫" * 5000)
    else:
        path = written(tmp_path, kind, texts(90))

    def told(found: list[Block]) -> list[tuple]:
        return [(one.content, one.start, one.following, one.first, one.last) for one in found]

    whole = list(blocks(path, "body" if kind == "parquet" else "text"))
    assert len(whole) > 4
    for index, block in enumerate(whole):
        rest = blocks(path, "body" if kind == "parquet" else "text", block.start)
        assert told(list(rest)) == told(whole[index:])


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "in.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(BadInput, match="ArrowInvalid"):
        list(blocks(tmp_path / "in.parquet", "text"))
    pq.write_table(pa.table({"id": [1], "text": [7]}), tmp_path / "in.parquet")
    with pytest.raises(BadInput, match="column 'text' holds int64, not text"):
        list(blocks(tmp_path / "in.parquet", "text"))
    with pytest.raises(BadInput, match="has no column 'body'; its columns are id, text"):
        list(blocks(tmp_path / "in.parquet", "body"))
