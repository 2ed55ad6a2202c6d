"""Continue several prompts of any lengths at once: one run of the model a step serves every row."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from cosmos_runtime.arrays import Floats
from cosmos_runtime.batch_decoding import BatchDecoder, new_batch_decoder
from cosmos_runtime.continuation import Continuation
from cosmos_runtime.device_loop import DeviceLoop, DeviceLoops
from cosmos_runtime.errors import CosmosRuntimeError, InputError
from cosmos_runtime.generation import loops_for, new_continuation
from cosmos_runtime.quoting import quoted
from cosmos_runtime.sampling import Sampling
from cosmos_runtime.session import Session
from cosmos_runtime.steps import Steps
from cosmos_runtime.validation import prompt_rows


def generate_batch(
    session: Session,
    prompts: Sequence[npt.ArrayLike],
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop_ids: Sequence[int] = (),
    device_loop: bool | None = None,
    diagnostics: bool = False,
) -> "BatchGeneration":
    """Continue several prompts, each the token ids (T,) of its row; a row's answer is the one it gets alone.

    `sampling` is one for all rows (a seed in it is every row's: equal prompts then get equal answers) or one a row.
    The rest is as in `generate`; rows end independently.

    Raises: InputError for a bad prompt (naming its row), length or stop id, or as `generate` does for `device_loop`.
    """
    given = prompt_rows(prompts)
    choices = _one_a_row(sampling, len(given))
    rows = []
    for row, (prompt, choice) in enumerate(zip(given, choices, strict=True)):
        try:
            continuation = new_continuation(
                session,
                prompt,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                sampling=choice,
                stop_ids=stop_ids,
                diagnostics=diagnostics,
            )
        except InputError as error:
            raise InputError(f"row {row}: {error}") from error
        rows.append(continuation)
    if rows and (loops := loops_for(session, rows, device_loop)):
        return DeviceBatchGeneration(session, rows, loops)
    return BatchGeneration(session, rows)


class BatchGeneration(Steps[list[tuple[int, int]]]):
    """An iterator of steps, each a list of (row, new token id) of the rows that go on; made by `generate_batch`.

    `rows` holds what is known of each row: prompt, tokens so far, sampling, finish reason, diagnostics. Ends and shares
    as `Generation` does.
    """

    def __init__(self, session: Session, rows: Sequence[Continuation]) -> None:
        super().__init__()
        self.rows = tuple(rows)
        self._session = session
        self._decoder: BatchDecoder | None = None

    def run(self) -> list[list[int]]:
        """Every remaining step; the new tokens of every row."""
        for _ in self:
            pass
        return [row.tokens for row in self.rows]

    def stop(self, row: int | None = None) -> None:
        """End one row, or all: then also what is being computed, where that is possible. Any thread may call it."""
        for continuation in self.rows if row is None else (self.rows[row],):
            continuation.stop()
        if (decoder := self._decoder) is not None and not self._running():
            decoder.cancel()

    def close(self) -> None:
        """End every row, and free the cache: now, or when the step that another thread is taking is given up."""
        self.stop()
        self._end()

    def _step(self) -> list[tuple[int, int]]:
        step = [(row, token) for row, token in self._choose() if token is not None]
        if not step:
            raise StopIteration
        return step

    def _is_last(self) -> bool:
        return not self._running()

    def _choose(self) -> list[tuple[int, int | None]]:
        """Rows that go on, with their next tokens; None for one that ends instead."""
        return [(row, self.rows[row].choose(logits)) for row, logits in self._next_logits()]

    def _free(self) -> None:
        self._decoder = None

    def _running(self) -> list[int]:
        return [row for row, continuation in enumerate(self.rows) if continuation.finish_reason is None]

    def _next_logits(self) -> list[tuple[int, Floats]]:
        """Rows that go on, with the logits (V,) of their next positions."""
        running = self._running()
        if not running:
            return []
        try:
            logits = self._start(running) if self._decoder is None else self._decode(self._decoder, running)
        except CosmosRuntimeError:
            if self._running():
                raise
            return []
        return [(row, of_row) for row, of_row in logits if self.rows[row].finish_reason is None]

    def _start(self, running: list[int]) -> list[tuple[int, Floats]]:
        capacity = max(self.rows[row].capacity for row in running)
        calls = max(self.rows[row].most_calls for row in running)
        wanted = any(row.wants_diagnostics for row in self.rows)
        decoder = self._decoder = new_batch_decoder(self._session, len(self.rows), capacity, calls, diagnostics=wanted)
        if not self._running():  # `stop` came in before there was anything to cancel
            decoder.cancel()
        logits = []
        for row in running:
            if self.rows[row].finish_reason is not None:  # meanwhile
                continue
            logits.append((row, decoder.prefill(row, self.rows[row].prompt_ids)))
            self.rows[row].examine(decoder.diagnosis(row))
        return logits

    def _decode(self, decoder: BatchDecoder, running: list[int]) -> list[tuple[int, Floats]]:
        logits = decoder.decode(running, [self.rows[row].tokens[-1] for row in running])
        for row in running:
            self.rows[row].examine(decoder.diagnosis(row))
        return list(zip(running, logits, strict=True))


class DeviceBatchGeneration(BatchGeneration):
    """A batch whose tokens a device loop chooses; the buffers are given back at its end, or by `close`."""

    def __init__(self, session: Session, rows: Sequence[Continuation], loops: DeviceLoops) -> None:
        super().__init__(session, rows)
        self._loops: DeviceLoops | None = loops
        self._loop: DeviceLoop | None = None
        self._steps: Iterator[npt.NDArray[np.int64]] | None = None

    def _choose(self) -> list[tuple[int, int | None]]:
        running = self._running()
        if not running or self._loops is None:
            return []
        if self._steps is None:
            self._loop = self._loops.start(self.rows)
            self._steps = self._loop.steps()
        tokens = next(self._steps)
        return [(row, self.rows[row].keep(int(tokens[row]))) for row in running]

    def _free(self) -> None:
        if self._loop is not None:
            self._loop.close()
        self._loop = self._steps = self._loops = None


def _one_a_row(sampling: Sampling | Sequence[Sampling] | None, rows: int) -> Sequence[Sampling | None]:
    if sampling is None or isinstance(sampling, Sampling):
        return [sampling] * rows
    if not isinstance(sampling, Sequence):
        raise InputError(f"sampling: expected one, or one for each of {rows} prompts, got {quoted(sampling)}")
    if len(sampling) != rows:
        raise InputError(f"sampling: expected one, or one for each of {rows} prompts, got {len(sampling)}")
    return sampling
