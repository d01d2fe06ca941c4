"""The engine: requests of token ids in, tokens out, as they are made.

`step` is the loop body: admit what fits, work on one prompt, make one token for every other running
sequence. When a single sequence runs, and it is greedy or the device samples, its tokens are chosen on
the device and many steps go out in one launch. With speculation, a single sequence's next tokens are
guessed (looked up in what it holds already, or by the checkpoint's own layer) and verified in one step of
several rows: each row's token is chosen as plain decoding would choose it there, and the rows up to the
first wrong guess count. Where the device chooses the tokens, the layer's guesses are made there as well, in
the same step. Several sequences fill the rows of a step with tokens that are all of use, so nothing is
drafted for them.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from tilert.engine.cache import PageCache
from tilert.engine.core import SamplingParams
from tilert.engine.mtp import LayerDrafter
from tilert.engine.runner import Row, Runner
from tilert.engine.sampling import SampledToken, Sampler
from tilert.engine.speculate import Drafter
from tilert.errors import UserError
from tilert.ir.program import PAGE

LAUNCH_STEPS = 64  # most steps of one launch: bounds what another request waits for
# With speculation, steps of a launch after which a draft is looked for. A launch that is closed for one
# would throw away the step that it has begun meanwhile, so it is short instead: four steps cost 0.6 %
# more per token than 64 on a CPU, and a draft comes three tokens late at worst.
LOOK_STEPS = 4


@dataclass(slots=True, eq=False)
class Sequence:
    """One stream of tokens: a prompt, what was made after it, and its place in cache and page table."""

    id: int
    tokens: list[int]  # prompt, then output
    prompt_length: int
    limit: int  # most tokens in all
    sampler: Sampler
    stop_ids: frozenset[int]
    drafter: Drafter | LayerDrafter | None = None  # with speculation
    pages: list[int] = field(default_factory=list)
    computed: int = 0  # positions whose keys and values are in the cache
    slot: int = -1
    finish_reason: str | None = None
    stop_reason: int | None = None

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet; 1 while decoding."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Event:
    """A new token of sequence `id`; the reasons are set on its last one."""

    id: int
    token: SampledToken
    finish_reason: str | None
    stop_reason: int | None
    time: float  # time.perf_counter() when the token was known
    drafted: int = 0  # drafts that the token's step verified; 0: it was not speculative
    row: int = 0  # of that step


class Engine:
    """Runs sequences on a Runner until none is left. Single-threaded: call from one thread.

    speculative_tokens: most tokens of a draft, 0 to MAX_DRAFT; 0 is decoding without speculation.
    layer: made by `runner.beside`, of the layer that drafts; then `runner` gives hidden states. None: drafts
    are looked up.
    """

    def __init__(
        self, runner: Runner, vocab_size: int, eos_token_ids: tuple[int, ...],
        speculative_tokens: int = 0, layer: Runner | None = None,
    ) -> None:  # fmt: skip
        self.layer = layer
        self.runner, self.vocab_size, self.eos_token_ids = runner, vocab_size, eos_token_ids
        self.speculative_tokens = min(
            speculative_tokens, runner.few - 1 if speculative_tokens else 0
        )
        self.cache = PageCache(runner.num_pages)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.slots = list(range(runner.sequences))
        self.ids = itertools.count()

    def add(self, prompt: list[int], params: SamplingParams, index: int = 0) -> int:
        """Queue a sequence and return its id. `index` tells the n sequences of one request apart.

        Raises UserError for an empty or too long prompt or an id outside the vocabulary.
        """
        context = self.runner.context
        if not prompt:
            raise UserError("the prompt is empty; it must have at least one token")
        if len(prompt) >= context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, but the context holds {context} and at least one"
                " must be left for the answer; shorten it or raise --max-model-len"
            )
        if bad := [t for t in prompt if not 0 <= t < self.vocab_size]:
            raise UserError(
                f"token id {bad[0]} is outside the vocabulary of {self.vocab_size} tokens"
            )
        room = context - len(prompt)
        limit = len(prompt) + min(
            params.max_tokens if params.max_tokens is not None else room, room
        )
        stops = frozenset(params.stop_token_ids or ()) | (
            frozenset() if params.ignore_eos else frozenset(self.eos_token_ids)
        )
        sampler = Sampler(params, prompt, self.vocab_size, self.eos_token_ids, index=index)
        sequence = Sequence(next(self.ids), list(prompt), len(prompt), limit, sampler, stops)
        if self.speculative_tokens and self.layer:
            sequence.drafter = LayerDrafter(self.layer, sequence.tokens, self.speculative_tokens)
        elif self.speculative_tokens:
            sequence.drafter = Drafter(sequence.tokens, self.speculative_tokens)
        self.waiting.append(sequence)
        return sequence.id

    def events(self) -> Generator[Event, None, None]:
        """Tokens of all sequences as they are made, until every one has ended."""
        while self.waiting or self.running:
            yield from self.step()
        self.cache.check()

    def step(self) -> Iterator[Event]:
        """One turn: admit, one piece of one prompt, a token or more for each sequence that decodes."""
        self._admit()
        for sequence in [s for s in self.running if s.pending > 1][:1]:
            yield from self._prompt(sequence)
        decoding = [s for s in self.running if s.pending == 1]
        alone = len(decoding) == 1 and len(self.running) == 1
        if alone and (steps := self._guess_steps(decoding[0])):
            yield from self._guess(decoding[0], steps)
        elif alone and (draft := self._draft(decoding[0])):
            yield from self._verify(decoding[0], draft)
        elif alone and (steps := self._launch_steps(decoding[0])):
            yield from self._loop(decoding[0], steps)
        elif decoding:
            yield from self._decode(decoding)

    def abort(self, sequence_id: int, reason: str = "abort") -> None:
        """End a sequence now; unknown ids (already ended) are ignored."""
        for sequence in [*self.waiting, *self.running]:
            if sequence.id == sequence_id:
                self._finish(sequence, reason, None)

    def _admit(self) -> None:
        # One prompt at a time, so that the next one finds the pages that it shares with this one.
        while self.waiting and self.slots and all(s.pending == 1 for s in self.running):
            sequence = self.waiting[0]
            sequence.pages = self.cache.match(sequence.tokens)
            if self.layer and sequence.pages:
                # A page's last row in the layer's caches needs the token after the page. So that no row
                # is missing or was made for another token, the last page that is found is made again.
                self.cache.release([sequence.pages.pop()])
            sequence.computed = len(sequence.pages) * PAGE
            if self.cache.free < -(-len(sequence.tokens) // PAGE) - len(sequence.pages) + len(
                self.running
            ):
                self.cache.release(sequence.pages)
                sequence.pages, sequence.computed = [], 0
                return
            self.waiting.popleft()
            sequence.slot = self.slots.pop()
            if isinstance(sequence.drafter, LayerDrafter):
                sequence.drafter.begin(sequence.slot, sequence.computed)
            self.running.append(sequence)

    def _prompt(self, sequence: Sequence) -> Iterator[Event]:
        begin = sequence.computed
        end = min(len(sequence.tokens), begin + self.runner.prompt)
        self._reserve(sequence, end)
        rows = [Row(sequence.tokens[p], p, sequence.slot) for p in range(begin, end)]
        last = end == len(sequence.tokens)
        self.runner.step(rows, [end - begin - 1] if last else [])
        self._note(sequence, 0, len(rows))
        sequence.computed = end
        self.cache.remember(sequence.tokens[:end], sequence.pages)
        if last:
            yield self._commit(sequence, sequence.sampler.sample(self.runner.logits()[0]))

    def _decode(self, sequences: list[Sequence]) -> Iterator[Event]:
        for sequence in sequences:
            if sequence in self.running:  # a reservation may send another one back
                self._reserve(sequence, len(sequence.tokens))
        sequences = [s for s in sequences if s in self.running]
        rows = [Row(s.tokens[-1], s.computed, s.slot) for s in sequences]
        greedy = self.runner.step(rows, range(len(rows)))
        events = []
        chosen = self._chosen([s.sampler for s in sequences], greedy)
        for row, (sequence, token) in enumerate(zip(sequences, chosen, strict=True)):
            self._note(sequence, row, row + 1)
            sequence.computed += 1
            events.append(self._commit(sequence, token))
        yield from events

    def _chosen(self, samplers: list[Sampler], greedy: np.ndarray) -> Iterator[SampledToken]:
        """The token of each row of the last step, when it is asked for. Logits are fetched once they are
        needed: from a GPU that takes as long as a fifth of a step."""
        logits: np.ndarray | None = None
        for row, sampler in enumerate(samplers):
            if sampler.is_plain_greedy:
                yield sampler.commit(int(greedy[row]))
                continue
            logits = self.runner.logits() if logits is None else logits
            yield sampler.sample(logits[row])

    def _note(self, sequence: Sequence, begin: int, end: int) -> None:
        """Rows [begin, end) of the last step are the next positions of the sequence."""
        if isinstance(sequence.drafter, LayerDrafter):
            sequence.drafter.note(self.runner.hidden(begin, end))

    def _draft(self, sequence: Sequence) -> list[int]:
        """Tokens that may come next; the step that verifies them makes one more, within the limit.

        None where the device would sample: the host samples the rows of a step, which takes longer than a
        right guess saves.
        """
        if sequence.drafter is None or (
            self.runner.samples and not sequence.sampler.is_plain_greedy
        ):
            return []
        most = min(sequence.limit - len(sequence.tokens) - 1, self.speculative_tokens)
        self._reserve(sequence, sequence.computed + 1 + most)
        return sequence.drafter.draft(most)

    def _verify(self, sequence: Sequence, draft: list[int]) -> Iterator[Event]:
        """The tokens of one step over the last token and those of a draft.

        Row i stands for a token of the sequence when the guesses before it were right; only then does
        its position count as computed. Later steps overwrite what wrong ones left in the cache.
        """
        first = sequence.computed
        fed = [sequence.tokens[-1], *draft]
        rows = [Row(token, first + i, sequence.slot) for i, token in enumerate(fed)]
        greedy = self.runner.step(rows, range(len(rows)))
        chosen = self._chosen([sequence.sampler] * len(rows), greedy)
        for i, (guess, token) in enumerate(zip([*draft, None], chosen, strict=True)):
            self._note(sequence, i, i + 1)
            sequence.computed += 1
            yield self._commit(sequence, token, len(draft), i)
            if sequence.finish_reason or token.token_id != guess:
                return

    def _guess_steps(self, sequence: Sequence) -> int:
        """How many steps of verifying and guessing the device can make in one launch: none where tokens are
        not chosen there or there is nothing to guess from, none for the last token, and none where a guess
        could lie outside the context."""
        left, rows = sequence.limit - len(sequence.tokens), self.speculative_tokens + 1
        begun = isinstance(sequence.drafter, LayerDrafter) and sequence.drafter.begun
        if not begun or left < 2 or not sequence.sampler.is_plain_greedy:
            return 0
        room = self.runner.context - sequence.computed - 2 * self.speculative_tokens
        return max(0, min(-(-left // rows), LAUNCH_STEPS // rows, room // rows + 1))

    def _guess(self, sequence: Sequence, steps: int) -> Iterator[Event]:
        """The tokens of one launch whose steps verify the guesses that they begin with, as `_verify`, and
        make the next ones."""
        drafter, drafts = sequence.drafter, self.speculative_tokens
        assert isinstance(drafter, LayerDrafter) and self.layer, "the layer guesses"
        first = sequence.computed
        self._reserve(sequence, first + (steps - 1) * (drafts + 1) + 2 * drafts)
        fed = [sequence.tokens[-1], *drafter.draft(drafts)]
        launch = self.runner.guess(self.layer, fed, first, sequence.slot, steps, sequence.stop_ids)
        with closing(launch):
            for made in launch:
                drafted = min(drafts, sequence.limit - len(sequence.tokens) - 1)
                drafter.skip(sequence.computed + len(made))
                for row, token in enumerate(made):
                    sequence.computed += 1
                    yield self._commit(sequence, sequence.sampler.commit(token), drafted, row)
                    if sequence.finish_reason:  # set by the token itself, or by abort() meanwhile
                        return
        drafter.skip(sequence.computed, self.runner.guesses(self.layer, drafts))

    def _launch_steps(self, sequence: Sequence) -> int:
        """How many of its next tokens the device can choose in one launch. None with a layer that drafts,
        for it needs the hidden state of every step; see `_guess_steps`."""
        if self.layer:
            return 0
        most = LOOK_STEPS if sequence.drafter else LAUNCH_STEPS
        steps = min(sequence.limit - len(sequence.tokens), most)
        if sequence.sampler.is_plain_greedy:
            return steps
        return sequence.sampler.steady(steps) if self.runner.samples else 0

    def _loop(self, sequence: Sequence, steps: int) -> Iterator[Event]:
        self._reserve(sequence, len(sequence.tokens) + steps)
        row = Row(sequence.tokens[-1], sequence.computed, sequence.slot)
        sampler = None if sequence.sampler.is_plain_greedy else sequence.sampler
        with closing(self.runner.loop(row, steps, sequence.stop_ids, sampler)) as tokens:
            for token, report in tokens:
                sequence.computed += 1
                yield self._commit(sequence, sequence.sampler.commit(token, report))
                if sequence.finish_reason:  # set by the token itself, or by abort() meanwhile
                    return

    def _commit(
        self, sequence: Sequence, token: SampledToken, drafted: int = 0, row: int = 0
    ) -> Event:
        sequence.tokens.append(token.token_id)
        if token.token_id in sequence.stop_ids:
            self._finish(sequence, "stop", token.token_id)
        elif len(sequence.tokens) >= sequence.limit:
            self._finish(sequence, "length", None)
        now, reasons = time.perf_counter(), (sequence.finish_reason, sequence.stop_reason)
        return Event(sequence.id, token, *reasons, now, drafted, row)

    def _finish(self, sequence: Sequence, reason: str, stop_reason: int | None) -> None:
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_back(sequence)
        else:
            self.waiting.remove(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        if isinstance(
            sequence.drafter, LayerDrafter
        ):  # what may be found of it is all but the last page
            sequence.drafter.settle((sequence.computed // PAGE - 1) * PAGE)
        self.cache.remember(sequence.tokens[: sequence.computed], sequence.pages)
        self.cache.release(sequence.pages)
        self.slots.append(sequence.slot)
        sequence.pages, sequence.slot, sequence.computed = [], -1, 0

    def _reserve(self, sequence: Sequence, positions: int) -> None:
        """Pages for so many positions; when there are none, the newest other sequence starts over."""
        while len(sequence.pages) * PAGE < positions:
            if not self.cache.free:
                newest = next(s for s in reversed(self.running) if s is not sequence)
                self.running.remove(newest)
                self._give_back(newest)
                self.waiting.appendleft(newest)
                continue
            sequence.pages.append(self.cache.take())
        self.runner.set_pages(sequence.slot, sequence.pages)
