"""What a user may get wrong, by the real command: one report that names the fault, and the right exit status."""

import os
from pathlib import Path

import pytest
import tokenizers
import torch

from launch.prepare_data import main as prepare
from launch.weights.reader import open_weights
from launch.weights.stored_model import WeightsError
from tests.faults.forked import Forked
from tests.faults.launched import TinyJob

pytestmark = pytest.mark.faults


def refused(tiny: TinyJob, *overrides: str, status: int = 1) -> str:
    """What a world of one says when it stops with `status`."""
    with tiny.alone(*overrides) as job:
        assert job.wait() == status, job.output[-8000:]
        assert "Traceback" not in job.output, job.output[-8000:]
        return job.output


def test_configuration_errors_are_one_report_before_any_process_group(tmp_path: Path) -> None:
    tiny = TinyJob(tmp_path)
    overrides = ["model.num_key_value_heads=3", "training.max_stepz=5", "parallel.tensor_parallel_size=two"]
    said = refused(tiny, *overrides, status=2)
    with tiny.launch(2, *overrides) as job:
        assert job.wait() == 2, job.output[-8000:]
        from_the_launcher = job.output
    for output in (said, from_the_launcher):
        assert output.count("errors in the job's configuration") == 1, output
        for part in ("num_attention_heads (4) must be divisible by", "training.max_stepz", "max_steps", "two"):
            assert part in output, (part, output)
        assert "Traceback" not in output
    assert not tiny.run.exists()


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="the message needs a machine without GPUs")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    said = refused(TinyJob(tmp_path), "job.device=cuda", status=2)
    assert said.startswith("job.device is cuda, but this node has 0 GPUs for 1 process; start fewer processes")


def test_an_empty_corpus(tmp_path: Path) -> None:
    tiny = TinyJob(tmp_path)
    for path in (tmp_path / "text").iterdir():
        path.write_bytes(b"")
    assert "error: the corpus is empty: 8 files, 0 tokens; point data.files at files with text" in refused(tiny)
    assert "no file matches" in refused(tiny, f"data.files=['{tmp_path}/nothing/*.txt']")


def test_a_binary_corpus_under_a_tokenizer(tmp_path: Path) -> None:
    tiny = TinyJob(tmp_path)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "1": 1}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    binary = tmp_path / "text" / "3.txt"
    binary.write_bytes(b"text, then\0" + os.urandom(64))
    said = refused(tiny, f"data.tokenizer={tmp_path}/tokenizer.json", f"data.cache_directory={tmp_path}/cache")
    assert f"error: {binary}: binary, not text (NUL at byte 10); leave it out of data.files, or use " in said


def test_a_loss_that_is_not_finite_stops_the_job_with_step_and_ranks(tmp_path: Path) -> None:
    tiny = TinyJob(tmp_path, cp=2)
    with tiny.launch(2, "model.initializer_range=3e38") as job:  # fp32 ends at 3.4e38
        assert job.wait() == 1, job.output[-8000:]
        said = job.output
    assert "error: step 1: loss nan, gradient norm " in said, said[-8000:]
    assert "; it arose on rank 0, 1. Last good checkpoint: none. " in said, said[-8000:]
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert tiny.complete() == []


def test_a_gradient_that_is_not_finite_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    tiny = TinyJob(tmp_path, max_steps=3)
    with tiny.alone() as job:
        assert job.wait() == 0, job.output[-8000:]
    # Step 4 computes with sound weights and ruins them: its checkpoint is complete, but not good. Step 5's norms square
    # numbers beyond fp32, which its loss survives.
    said = refused(tiny, "training.max_steps=9", "training.gradient_clipping=0", "optimizer.learning_rate=1e30")
    assert "resumed from step 3, " in said and "step 4/9  loss " in said
    assert "error: step 5: loss " in said and ", gradient norm inf; it arose in the gradients only. " in said, said
    back = f"python launch/rollback.py {tiny.run} --step 3 goes back to it"
    good = f"Last good checkpoint: step-00000003 in {tiny.checkpoints} ({back}). "
    assert good in said, said
    assert "(training.gradient_clipping is 0; 0 clips none)" in said
    assert tiny.complete()[-1] == 4


def test_what_would_cost_the_run_at_its_end_is_said_before_its_first_step(tmp_path: Path) -> None:
    tiny = TinyJob(tmp_path)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "def": 256}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "file").touch()
    prefix, text = tmp_path / "corpus", sorted(map(str, (tmp_path / "text").iterdir()))
    assert prepare(["--input", *text, "--tokenizer", "bytes", "--output", str(prefix)]) == 0
    sampled = ["data.source=indexed", "data.files=[]", f"data.blend=[{{path: {prefix}}}]", "training.sample_tokens=4"]
    for overrides, status, complaint in [
        (
            ["training.precision=fp16", "job.device=auto"],
            2,
            "precision is fp16, which DeepSpeed trains on GPUs only",
        ),
        (["job.run_directory=file"], 1, "error: run directory file cannot be written ([Errno 17] File exists: 'file')"),
        (["checkpoint.directory=file"], 1, "error: checkpoints could not be written to file: rank 0: [Errno 20] Not a"),
        ([*sampled, "data.tokenizer=none.json"], 1, "error: the tokenizer 'none.json' cannot be read ([Errno 2]"),
        (
            [*sampled, "data.tokenizer=tokenizer.json", "training.sample_prompt=def"],
            1,
            "error: training.sample_prompt has token id 256 (data.tokenizer: tokenizer.json), beyond model.vocab_size",
        ),
    ]:
        if "training.precision=fp16" in overrides and torch.cuda.device_count():
            continue
        with Forked(tiny, 1, *overrides) as job:
            assert job.exit_status(0) == status, job.output[-8000:]
            said = job.output
        assert said.startswith(complaint) and "Traceback" not in said and "step 1/" not in said, said


def test_a_checkpoint_that_was_cut_is_refused_by_all_who_read_it(tmp_path: Path) -> None:
    tiny = TinyJob(tmp_path, max_steps=2)
    with Forked(tiny, 1) as job:
        assert job.exit_status(0) == 0, job.output[-8000:]
    data = tiny.checkpoints / "step-00000002" / "__0_0.distcp"
    os.truncate(data, 100)
    with pytest.raises(WeightsError, match=r"is damaged: __0_0.distcp has 100 bytes instead of \d+; give --step"):
        open_weights(tiny.run)


def test_a_node_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "nothing compiled before"))
    said = refused(TinyJob(tmp_path), "training.compile=true")
    assert "error: torch.compile failed: " in said and "C++ compiler" in said
    assert said.rstrip().endswith("; mend that, or set training.compile: false")
