"""The data cursor: what the order of the data depends on besides the step, small, plain, and kept with each checkpoint.

    {"format": 1, "seed": 0, "sequence_length": 8192, "packing": "split",
     "corpora": {"web": FINGERPRINT, "code": FINGERPRINT},
     "history": [{"step": 0, "global_batch_size": 512, "weights": {"web": 0.7, "code": 0.3}},
                 {"step": 4000, "global_batch_size": 512, "weights": {"web": 0.5, "code": 0.5}}],
     "skipped": [[4801, 5000]]}

Global sample t comes from one corpus (`launch.data.blend`), and is that corpus's next sample: how many it has given
before follows from the history. So the weights may change at a resume, and every corpus goes on where it was.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass

from launch.data.batches import Sample, SequenceSampler
from launch.data.blend import Blend
from launch.data.corpus import CorpusError, Int64
from launch.data.skipped import StepRanges, check_ranges, in_words, steps_skipped

FORMAT = 1
ACCEPT_DATA = "data"
"""What checkpoint.accept_changes calls a change of the data itself."""


_STRICT = ConfigDict(strict=True, extra="forbid")
"""A record is believed no further than its types: a damaged number would be counted up to for ever."""


@validated_dataclass(frozen=True, config=_STRICT)
class Segment:
    """Steps of one blend."""

    step: Annotated[int, Field(ge=0)]
    """The first, counted from 0."""
    global_batch_size: Annotated[int, Field(ge=1)]
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]

    def __post_init__(self) -> None:
        if not any(self.weights.values()):
            raise ValueError(f"weights {self.weights} leave nothing to read")


@validated_dataclass(frozen=True, config=_STRICT)
class DataCursor:
    """The order of a run's samples, from its start to its last segment's end, which is open."""

    seed: int
    sequence_length: int
    packing: str
    corpora: dict[str, str]
    """Fingerprint of each corpus that the run has drawn from, by name."""
    history: Annotated[tuple[Segment, ...], Field(min_length=1)]
    """Ascending; the first is of the step at which the data began: 0, unless a change of the data was accepted."""
    skipped: StepRanges = ()
    """Steps that read nothing; their samples keep their places in the order. Older records have none."""

    def __post_init__(self) -> None:
        steps, drawn = [one.step for one in self.history], {name for one in self.history for name in one.weights}
        if steps != sorted(set(steps)):
            raise ValueError(f"the steps of the history {steps} do not ascend")
        if unknown := drawn - set(self.corpora):
            raise ValueError(f"the history names corpora without a fingerprint: {', '.join(sorted(unknown))}")
        check_ranges(self.skipped)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> DataCursor:
        """The inverse of `record`. Raises CorpusError where it is none."""
        try:
            fields = {key: value for key, value in record.items() if key != "format"}
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']}, this program reads {FORMAT}")
            return _CURSOR.validate_json(json.dumps(fields))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            why = repr(error)
            if isinstance(error, ValidationError):  # its text takes many lines
                first = error.errors()[0]
                why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise CorpusError(
                f"the record of what the run has read is not readable ({why}); a run saved by another version of "
                "this program cannot continue here: finish it there, or start another job.name"
            ) from error

    def record(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"format": FORMAT, **_CURSOR.dump_python(self, mode="json")}

    def continued(self, step: int, now: DataCursor, accepted: Collection[str] = ()) -> DataCursor:
        """This cursor, saved after `step` steps, going on as the fresh cursor `now` says.

        Weights, corpora, global batch size and the steps to be skipped may differ. Raises CorpusError where seed,
        sequence length, packing or the content of a corpus do, since that would repeat some documents and lose others;
        where the key, or "data", is among the `accepted`, the data begins anew with `step` instead. Raises CorpusError
        where other steps than before are skipped among those that are over.
        """
        [segment] = now.history
        anew = replace(now, history=(replace(segment, step=step),))
        for key, name in _FIXED.items():
            before, after = getattr(self, key), getattr(now, key)
            if before != after and not {name, ACCEPT_DATA}.isdisjoint(accepted):
                return anew
            if before != after:
                raise CorpusError(
                    f"{name} was {before} up to step {step} and is {after} now; documents would be repeated and lost: "
                    f"set {name}={before}, choose another job.name, or, to begin the data anew, name {ACCEPT_DATA} in "
                    "checkpoint.accept_changes"
                )
        for name, fingerprint in now.corpora.items():
            if (known := self.corpora.get(name, fingerprint)) != fingerprint:
                if ACCEPT_DATA in accepted:
                    return anew
                raise CorpusError(
                    f"the run was trained on other data (corpus {name}: fingerprint {known[:12]}, here "
                    f"{fingerprint[:12]}): the corpus, its tokenizer or the split changed; restore it, give the new "
                    "one another name in data.blend, choose another job.name, or, to begin the data anew, name "
                    f"{ACCEPT_DATA} in checkpoint.accept_changes"
                )
        before, after = (in_words(steps_skipped(one.skipped, 0, step)) for one in (self, now))
        if before != after:
            raise CorpusError(
                f"training.skip_steps left out {before} up to step {step} and leaves out {after} of them now; what is "
                "over stays as it was: name the same of these steps again, or go back to a checkpoint before them "
                "(python launch/rollback.py RUN --step STEP)"
            )
        kept = tuple(one for one in self.history if one.step < step)
        if not kept or replace(segment, step=kept[-1].step) != kept[-1]:
            kept += (replace(segment, step=step),)
        return replace(self, corpora=self.corpora | now.corpora, history=kept, skipped=now.skipped)

    def changes_at(self, step: int) -> bool:
        """Whether another blend or batch size begins with `step`."""
        return step > 0 and self.history[-1].step == step

    def first_sample(self, step: int) -> int:
        """The global sample that `step` begins with."""
        span = next(span for span in reversed(self._spans) if span.segment.step <= step)
        return span.first + (step - span.segment.step) * span.segment.global_batch_size

    @property
    def offset(self) -> int:
        """See `launch.data.batches.Batches`: of the last segment."""
        last = self.history[-1]
        return self.first_sample(last.step) - last.step * last.global_batch_size

    def skips(self, start: int, stop: int) -> list[range]:
        """Which of the steps from `start` up to `stop` read nothing."""
        return steps_skipped(self.skipped, start, stop)

    def read(self, step: int) -> Counter[str]:
        """How many samples of each corpus the steps before `step` read."""
        count = self.given(self.first_sample(step))
        for steps in self.skips(self.history[0].step, step):
            count -= self.given(self.first_sample(steps.stop)) - self.given(self.first_sample(steps.start))
        return count

    def draws(self, samples: Int64) -> dict[str, tuple[Int64, Int64]]:
        """Of each corpus among global `samples` [n]: where in `samples` it stands, and which of its own samples stand
        there, counted from 0."""
        found: dict[str, list[tuple[Int64, Int64]]] = {}
        for span in self._spans:
            inside = np.flatnonzero((samples >= span.first) & (samples < span.end))
            if not len(inside):
                continue
            start, stop = int(samples[inside].min()), int(samples[inside].max()) + 1
            given, corpora = span.given(start), span.blend.corpora(np.arange(start, stop))
            for index, name in enumerate(span.blend.names):
                own = corpora == index
                number = given[name] + np.cumsum(own) - 1
                at = inside[own[samples[inside] - start]]
                if len(at):
                    found.setdefault(name, []).append((at, number[samples[at] - start]))
        return {
            name: (np.concatenate([at for at, _ in parts]), np.concatenate([number for _, number in parts]))
            for name, parts in found.items()
        }

    def given(self, samples: int) -> Counter[str]:
        """How many of the global samples 0..samples-1 came from each corpus."""
        return next(span for span in reversed(self._spans) if span.first <= samples).given(samples)

    @cached_property
    def _spans(self) -> list[_Span]:
        spans: list[_Span] = []
        first, given = 0, Counter(dict.fromkeys(self.corpora, 0))
        for segment, after in zip(self.history, [*self.history[1:], None], strict=True):
            end = _OPEN if after is None else first + (after.step - segment.step) * segment.global_batch_size
            spans.append(_Span(segment, first, end, Blend(segment.weights, self.seed), given))
            if after is not None:
                first, given = end, spans[-1].given(end)
        return spans


_CURSOR = TypeAdapter(DataCursor)
_OPEN = 1 << 62


@dataclass(frozen=True)
class _Span:
    """A segment in global samples."""

    segment: Segment
    first: int
    end: int
    """The one after the last; _OPEN for the last segment."""
    blend: Blend
    before: Counter[str]
    """Samples of each corpus up to `first`."""

    def given(self, sample: int) -> Counter[str]:
        """Samples of each corpus up to `sample`, which lies in this span or ends it."""
        start, stop = self.blend.counts(self.first), self.blend.counts(sample)
        return self.before + Counter({name: stop[name] - start[name] for name in stop})


_FIXED = {
    "seed": "job.seed",
    "sequence_length": "training.sequence_length",
    "packing": "data.packing",
}


class BlendedSamples:
    """The samples of a run's corpora in the order of its cursor."""

    def __init__(self, samplers: Mapping[str, SequenceSampler], cursor: DataCursor) -> None:
        """One sampler for each corpus of the cursor's last segment."""
        self.samplers, self.cursor = dict(samplers), cursor
        self.sequence_length = cursor.sequence_length

    def samples(self, indices: Int64) -> list[Sample]:
        """See `launch.data.batches.SampleSource`. Raises CorpusError where a corpus cannot be read."""
        out: dict[int, Sample] = {}
        for name, (positions, numbers) in self.cursor.draws(indices).items():
            out.update(zip(positions.tolist(), self.samplers[name].samples(numbers), strict=True))
        return [out[position] for position in range(len(indices))]
