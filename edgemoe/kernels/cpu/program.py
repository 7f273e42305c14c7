"""Steps of native code, one after the other, which any number of threads run together.

A step is a kernel over rows. Threads take shares of its rows until none is left, and begin the next step once all rows
are done. A thread that comes late, or not at all, is not waited for: the others do its work.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from edgemoe.cache.compiled import Native
from edgemoe.kernels.cpu.arrays import Job, address
from edgemoe.kernels.cpu.dot_block import LINE
from edgemoe.kernels.cpu.semaphore import Semaphore, addresses
from edgemoe.kernels.cpu.vector_ir import INT, WORD, counting, load, load_words, native_loop, offset, pause

SHARES = 6
"""Shares of a step for each thread: few enough to be large, and many enough for threads to end at about one time."""
PATIENCE = 2000
"""Looks at what others do, of some 40 cycles each, before a waiting thread offers its core to other programs."""
HEADER, STEP, MAILBOX = 4, 6, 8
TAKEN, DONE = 4, 5
"""Places of a step's words: the rows that threads have begun, and that they have ended."""
"""Words of a program before its steps, of a step, and of a mailbox."""
PENDING, RUNNING, CLOSED, HANDLE, NUMBER, WAIT, POST, GIVE_WAY = range(MAILBOX)
"""Those of a mailbox: the program that waits there, whether one is run, and so on."""


class Step(NamedTuple):
    """What a native kernel computes: `kernel(job, scratch, first, last)` for the rows first ≤ r < last."""

    kernel: Native
    job: Job
    rows: int
    nbytes: int
    """Bytes that are read."""
    multiple: int = 1
    """Rows that are computed together: a share is a multiple of them."""
    scratch_nbytes: int = 0
    """Of the memory that a thread works in."""


class Mailbox:
    """Where a thread waits for programs to take part in, without the GIL."""

    def __init__(self, number: int) -> None:
        """`number` is the thread's among those that run a program, of which the caller is number 0."""
        self._semaphore = Semaphore()
        self._words = np.zeros(MAILBOX, np.int64)
        self._words[HANDLE:] = self._semaphore.handle, number, *addresses()
        self.address = address(self._words)

    def serve(self) -> None:
        """Takes part in the programs that are put here, until `close`."""
        serve.call(self.address, 0, 0, 0)

    def close(self) -> None:
        """Ends `serve`."""
        self._words[CLOSED] = 1
        self._semaphore.post()


class Program:
    """Steps that are run one after the other, as often as wanted."""

    def __init__(
        self, steps: Sequence[Step], helpers: Sequence[Mailbox] = (), memory: Callable[[int], Any] | None = None
    ) -> None:
        """`helpers` are those of threads that may take part, by their numbers.

        `memory(nbytes)` gives an array to work in, which programs that never run together may share.
        """
        threads = 1 + len(helpers)
        each = -(-max(step.scratch_nbytes for step in steps) // LINE) * LINE
        scratch = None if not each else np.empty(each * threads, np.uint8) if memory is None else memory(each * threads)
        self._held = steps, helpers, scratch
        words = [addresses()[2], 0 if scratch is None else address(scratch), each, len(steps)]
        for step in steps:
            share = -(-step.rows // (SHARES * threads)) if helpers else step.rows
            share = -(-share // step.multiple) * step.multiple
            words += [step.kernel.address, step.job.address, step.rows, max(1, share), 0, 0]
        self._words = array("q", words)
        self._mailboxes = array("q", [each.address for each in helpers])

    def run(self) -> None:
        """Offers the program to the helpers and takes part in it. No thread runs it any more when this returns."""
        words, (boxes, count) = self._words, self._mailboxes.buffer_info()
        for at in range(HEADER, len(words), STEP):
            words[at + TAKEN] = words[at + DONE] = 0
        run_program.call(words.buffer_info()[0], boxes, 0, count)


class _Emitter:
    """Emits the code of `run_program` and `serve`."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def run_program(self, program: Any, mailboxes: Any, first: Any, last: Any) -> None:
        """See `Program.run`."""
        builder = self._builder
        for each in self._boxes(mailboxes, first, last):
            builder.store_atomic(program, self._word(each, PENDING), "seq_cst", 8)
            self._call(self._load(each, POST), self._load(each, HANDLE), WORD(1), WORD(0))
        self._steps(program, WORD(0))
        give_way = self._load(program, 0)
        for each in self._boxes(mailboxes, first, last):
            # What is still there, no thread has begun, nor will it.
            left = builder.atomic_rmw("xchg", self._word(each, PENDING), WORD(0), "seq_cst")
            with builder.if_then(builder.icmp_signed("!=", left, program)):
                self._wait(self._word(each, RUNNING), partial(builder.icmp_signed, "==", WORD(0)), give_way)

    def serve(self, mailbox: Any) -> None:
        """See `Mailbox.serve`."""
        builder = self._builder
        look, work, end = (builder.append_basic_block(name) for name in ("sleep", "take_part", "closed"))
        builder.branch(look)
        builder.position_at_end(look)
        self._call(self._load(mailbox, WAIT), self._load(mailbox, HANDLE), WORD(-1), WORD(0))
        closed = builder.load_atomic(self._word(mailbox, CLOSED), "acquire", 8)
        builder.cbranch(builder.icmp_signed("==", closed, WORD(0)), work, end)
        builder.position_at_end(work)
        builder.store_atomic(WORD(1), self._word(mailbox, RUNNING), "seq_cst", 8)
        program = builder.atomic_rmw("xchg", self._word(mailbox, PENDING), WORD(0), "seq_cst")
        # There is none where the others were done before this thread woke.
        with builder.if_then(builder.icmp_signed("!=", program, WORD(0))):
            self._steps(program, self._load(mailbox, NUMBER))
        builder.store_atomic(WORD(0), self._word(mailbox, RUNNING), "seq_cst", 8)
        builder.branch(look)
        builder.position_at_end(end)

    def _boxes(self, mailboxes: Any, first: Any, last: Any) -> Iterator[Any]:
        with counting(self._builder, first, last, 1) as number:
            yield load(self._builder, self._builder.add(mailboxes, self._builder.mul(number, WORD(8))), WORD, align=8)

    def _steps(self, program: Any, number: Any) -> None:
        """The part of thread `number` in all steps."""
        builder = self._builder
        give_way, scratch, each, count = load_words(builder, program, HEADER)
        own = builder.add(scratch, builder.mul(number, each))
        with counting(builder, WORD(0), count, 1) as at:
            step = builder.add(offset(builder, program, 8 * HEADER), builder.mul(at, WORD(8 * STEP)))
            kernel, job, rows, share = load_words(builder, step, 4)
            done = self._word(step, DONE)
            self._work(kernel, (job, own), rows, share, self._word(step, TAKEN), done)
            self._wait(done, partial(builder.icmp_signed, "<=", rows), give_way)

    def _work(self, kernel: Any, arguments: tuple[Any, Any], rows: Any, share: Any, taken: Any, done: Any) -> None:
        """Shares of one step, until none is left."""
        builder = self._builder
        function = builder.inttoptr(kernel, ir.FunctionType(ir.VoidType(), [WORD] * 4).as_pointer())
        look, work, end = (builder.append_basic_block(name) for name in ("look", "work", "none_left"))
        builder.branch(look)
        builder.position_at_end(look)
        begin = builder.atomic_rmw("add", taken, share, "monotonic")
        builder.cbranch(builder.icmp_signed("<", begin, rows), work, end)
        builder.position_at_end(work)
        stop = builder.add(begin, share)
        stop = builder.select(builder.icmp_signed("<", stop, rows), stop, rows)
        builder.call(function, [*arguments, begin, stop])
        builder.atomic_rmw("add", done, builder.sub(stop, begin), "release")
        builder.branch(look)
        builder.position_at_end(end)

    def _wait(self, word: Any, is_over: Callable[[Any], Any], give_way: Any) -> None:
        """Until `word` is as it should be: other threads are in their last shares, and will be done soon."""
        builder = self._builder
        looks = cgutils.alloca_once(builder, WORD)
        builder.store(WORD(0), looks)
        look, wait, end = (builder.append_basic_block(name) for name in ("is_over", "pause", "go_on"))
        builder.branch(look)
        builder.position_at_end(look)
        builder.cbranch(is_over(builder.load_atomic(word, "acquire", 8)), end, wait)
        builder.position_at_end(wait)
        pause(builder)
        many = builder.add(builder.load(looks), WORD(1))
        builder.store(many, looks)
        with builder.if_then(builder.icmp_signed(">", many, WORD(PATIENCE))):
            self._call(give_way)
        builder.branch(look)
        builder.position_at_end(end)

    def _call(self, function: Any, *arguments: Any) -> None:
        """Calls a function of the system, which may ignore some of the words."""
        kind = ir.FunctionType(INT, [WORD] * len(arguments)).as_pointer()
        self._builder.call(self._builder.inttoptr(function, kind), arguments)

    def _word(self, base: Any, number: int) -> Any:
        return self._builder.inttoptr(offset(self._builder, base, 8 * number), WORD.as_pointer())

    def _load(self, base: Any, number: int) -> Any:
        return self._builder.load(self._word(base, number), align=8)


_run = native_loop(
    lambda builder, program, boxes, first, last: _Emitter(builder).run_program(program, boxes, first, last)
)
_serve = native_loop(lambda builder, mailbox, *others: _Emitter(builder).serve(mailbox))


@Native
def run_program(program, mailboxes, first, last):  # type: ignore[no-untyped-def]
    """See `Program.run`: the addresses of its words, and of those of some mailboxes."""
    _run(program, mailboxes, first, last)


@Native
def serve(mailbox, other, first, last):  # type: ignore[no-untyped-def]
    """See `Mailbox.serve`: the address of its words. The others are not used."""
    _serve(mailbox, other, first, last)
