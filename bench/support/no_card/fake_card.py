"""A card without a card: tensors of a device that have shapes and no values, and counts of what is done with them.

PyTorch's fake tensors refuse what mixes a device's tensors with the CPU's, and what needs a value on the host. On top
of that, operations, kernels and copies are counted.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, partialmethod
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bench.support.policies.lru import GlobalLRU
from edgemoe.cache import ExpertCache, ExpertId, Link, SlotPool, accelerator
from edgemoe.cache.link import Priority, Transfer
from edgemoe.cache.record import RecordLayout
from edgemoe.cache.slot_classes import limit_slots, slot_classes
from edgemoe.cache.slots import SlotTable
from edgemoe.cache.store import ExpertStore, Piece
from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.experts import expert_layer
from edgemoe.experts.expert_ffn import SortedGroups
from edgemoe.experts.expert_layer import ExpertLayers
from edgemoe.experts.host_reads import HostRead, HostReads
from edgemoe.kernels.cpu.threads import KernelThreads
from edgemoe.kernels.triton.launcher import Launch, Launcher

DEVICE = torch.device("lazy:0")
"""The one type of device beside the CPU for which every build of PyTorch can do what surrounds an operation."""
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique"}
"""Operations that the host waits for."""


@dataclass
class Counts:
    """What a pass did on the card."""

    launches: int = 0
    """Operations of PyTorch and kernels that were queued one by one, and replays of graphs, one each."""
    experts: int = 0
    """Those of them that compute experts."""
    host_reads: int = 0
    """Times that the host waited for a value of the card."""
    choices: int = 0
    """Those of them that read what routers have chosen."""
    copies: int = 0
    """Copies between the host and the card that nobody waits for."""
    names: Counter[str] = field(default_factory=Counter)
    """What was queued one by one, by its name."""


class FakeCard:
    """Everything that stands in for a card. One model at a time."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.launcher = Launcher()
        self.launcher.observer = self._launched
        self.chosen: Callable[[int], list[int]] = lambda pairs: [0] * pairs
        """What the host learns of routers: the experts of so many pairs."""
        self.capturing = False
        self.captured = 0
        """Operations and kernels in all graphs so far."""
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """In the block, tensors of `DEVICE` are fake."""
        patches = {
            "is_accelerator": lambda device: torch.device(device).type == DEVICE.type,
            "current_stream": lambda device: None,
        }
        with ExitStack() as stack:
            for name, stand_in in patches.items():
                stack.enter_context(mock.patch.object(accelerator, name, stand_in))
            stack.enter_context(mock.patch("edgemoe.model.graph_runner.buffer_table", _no_addresses))
            # PyTorch has no mixed precision for this type of device; models only turn it off.
            stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", return_value=False))
            stack.enter_context(mock.patch.object(torch, "autocast", new=_no_autocast))
            stack.enter_context(mock.patch.object(SortedGroups, "_on_host", partialmethod(_choices, self)))
            stack.enter_context(_OnCard(self, self._mode))
            yield

    def counted(self, work: Callable[[], object]) -> Counts:
        """What `work` did."""
        self.counts = Counts()
        work()
        return self.counts

    def moved(self, model: Any) -> Any:
        """A copy of `model`, on the meta device or the CPU, with fake weights of the same shapes."""
        made = copy.deepcopy(model)
        for module in made.modules():
            for owned in (module._parameters, module._buffers):
                for name, tensor in owned.items():
                    if tensor is not None:
                        owned[name] = self._fake(tensor, parameter=owned is module._parameters)
            packed = getattr(module, "packed", None)
            if packed is not None:
                packed.parts = {name: self._fake(part) for name, part in packed.parts.items()}
            for name, value in list(vars(module).items()):
                # Rotary embeddings keep a second reference to their frequencies.
                if isinstance(value, torch.Tensor):
                    vars(module)[name] = self._fake(value)
        made.tie_weights()
        return made.eval()

    def from_host(self, value: torch.Tensor, *, waits: bool) -> torch.Tensor:
        """A copy of `value`, of the CPU, on the card, for which the host `waits` or not."""
        if self.capturing:
            raise RuntimeError("operation not permitted while capturing: a copy from the host")
        self.counts.copies += 1
        self.counts.host_reads += waits
        found: torch.Tensor = self._fake(value)
        return found

    def queued(self, name: str, *, of_experts: bool = False) -> None:
        """Counts a launch."""
        if self.capturing:
            self.captured += 1
            return
        self.counts.launches += 1
        self.counts.experts += of_experts
        self.counts.names[name] += 1

    def _fake(self, tensor: torch.Tensor, *, parameter: bool = False) -> Any:
        with self._mode:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
        return torch.nn.Parameter(made, requires_grad=False) if parameter else made

    def _launched(self, launch: Launch) -> None:
        name = getattr(launch.kernel, "__name__", "kernel").strip("_")
        self.queued(name, of_experts=name in ("resolve", "up", "down", "combine", "patch"))


class FakeGraph:
    """Counts what is captured, and replays. Has the methods of `accelerator.Graph`."""

    def __init__(self, card: FakeCard) -> None:
        self._card = card

    def begin(self, pool: Any = None) -> None:
        """See `accelerator.Graph`."""
        self._card.capturing = True

    def end(self) -> None:
        """See `accelerator.Graph`."""
        self._card.capturing = False

    def replay(self) -> None:
        """See `accelerator.Graph`."""
        self._card.queued("graph")


class FakeCapturer:
    """See `model.pass_graph.Capturer`."""

    def __init__(self, card: FakeCard) -> None:
        self._card = card

    def graph(self) -> FakeGraph:
        """An empty graph."""
        return FakeGraph(self._card)

    def pool(self) -> None:
        """None is needed."""

    def make_room(self) -> None:
        """Nothing is kept."""

    @contextmanager
    def stream(self) -> Iterator[None]:
        """There is one order of work."""
        yield


class FakeReads(HostReads):
    """Reads of choices give what `FakeCard.chosen` does, and of scores zeros."""

    def __init__(self, card: FakeCard) -> None:
        self._card = card

    def start(self, values: Sequence[torch.Tensor]) -> HostRead:
        """See the base class."""
        assert all(value.device == DEVICE for value in values)
        self._card.counts.copies += len(values)
        shape = values[0].shape
        chosen = torch.tensor(self._card.chosen(values[0].numel())).view(shape)
        return _FakeRead(self._card, [chosen, *(torch.zeros(each.shape, dtype=each.dtype) for each in values[1:])])


class _FakeRead(HostRead):
    def __init__(self, card: FakeCard, values: list[torch.Tensor]) -> None:
        self._card, self._values = card, values

    def arrived(self) -> bool:
        """Never before it is waited for."""
        return False

    def wait(self) -> list[torch.Tensor]:
        """See the base class."""
        self._card.counts.host_reads += 1
        self._card.counts.choices += 1
        return self._values


class FakeStore(ExpertStore):
    """Records without content, of the layouts of `experts_modules`."""

    def __init__(self, experts_modules: Sequence[ExpertsModule]) -> None:
        self.layouts: tuple[RecordLayout, ...] = tuple(moe.layout for moe in experts_modules)
        self.experts = tuple(moe.experts for moe in experts_modules)

    def pieces(self, expert: ExpertId, slot: torch.Tensor) -> Sequence[Piece]:
        """None: nothing is moved."""
        return []

    def close(self) -> None:
        """Nothing is open."""


class FakeLink(Link):
    """Every record is there as soon as it is asked for."""

    def start(self, expert: ExpertId, slot: int, memory: torch.Tensor, priority: Priority) -> Transfer:
        """See the base class."""
        transfer = Transfer(expert, slot, memory.nbytes, priority)
        transfer.done = True
        return transfer

    def promote(self, transfer: Transfer) -> None:
        """Nothing waits."""

    def cancel(self, transfer: Transfer) -> bool:
        """See the base class."""
        return False

    def wait_any(self, transfers: Sequence[Transfer], seconds: float | None = None) -> list[Transfer]:
        """See the base class."""
        return list(transfers)

    def released(self, slots: Sequence[int]) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class OnFakeCard:
    """A model on a fake card, with its experts behind a cache."""

    model: Any
    layers: ExpertLayers
    cache: ExpertCache
    tools: Any
    """`DeviceTools`."""


def put_on(card: FakeCard, model: Any, experts_modules: Sequence[ExpertsModule], slots: int | None) -> OnFakeCard:
    """`model`, without the weights of its experts, on `card`, with `slots` slots (None is one for every expert).

    To be called inside of `card.running()`, and the result to be used there.
    """
    from edgemoe.experts.grouped_layer import DeviceTools, grouped
    from edgemoe.kernels.triton.grouped_ffn import patch

    own, store = card.moved(model), FakeStore(experts_modules)
    classes = slot_classes([layout.nbytes for layout in store.layouts], store.experts)
    pool = SlotPool(limit_slots(classes, slots or sum(store.experts)), DEVICE)
    table = SlotTable(store.experts, DEVICE, partial(patch, card.launcher))
    tools = DeviceTools(card.launcher, table, FakeReads(card))
    cache = ExpertCache(store, FakeLink(), pool, GlobalLRU(), table)
    every = [ExpertId(layer, each) for layer, count in enumerate(store.experts) for each in range(count)]
    cache.fill(every)
    layers = expert_layer.install(
        own, experts_modules, cache, KernelThreads(1), grouped=grouped(cache, tools, own.dtype)
    )
    return OnFakeCard(own, layers, cache, tools)


class _OnCard(TorchFunctionMode):
    """Calls that name the card, or get its tensors, run where these are fake; all others are the CPU's."""

    def __init__(self, card: FakeCard, mode: FakeTensorMode) -> None:
        super().__init__()
        self._card = card
        self._mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        given = tree_flatten((args, kwargs))[0]
        if any(_names_card(each) or isinstance(each, FakeTensor) for each in given) and not _only_asks(func):
            if func is torch.tensor:
                return self._card.from_host(func(*args, **kwargs | {"device": "cpu"}), waits=True)
            if func is torch.Tensor.to and not isinstance(args[0], FakeTensor):
                dtypes = [each for each in given if isinstance(each, torch.dtype)]
                waits = not kwargs.get("non_blocking", False)
                return self._card.from_host(args[0].to(*dtypes) if dtypes else args[0], waits=waits)
            # What is counted has to see the fake tensors, not what they are made of.
            with self._mode, _Counting(self._card):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


class _Counting(TorchDispatchMode):
    """Counts operations on fake tensors of the card."""

    def __init__(self, card: FakeCard) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        name = func.overloadpacket.__name__
        if name in READS and any(_on_card(each) for each in given):
            self._card.counts.host_reads += 1
            if self._card.capturing:
                raise RuntimeError(f"operation not permitted while capturing: {func}")
        found = func(*args, **kwargs)
        made = [each for each in tree_flatten(found)[0] if isinstance(each, torch.Tensor)]
        self._count(func, name, given, made, kwargs)
        return found

    def _count(
        self, func: Any, name: str, given: list[torch.Tensor], made: list[torch.Tensor], kwargs: dict[str, Any]
    ) -> None:
        places = {_on_card(each) for each in [*given, *made] if each.dim() or _on_card(each)}
        if True not in places or name in READS or torch.Tag.maybe_aliasing_or_mutating in func.tags and not made:
            return
        if name in ("_to_copy", "copy_") and len(places) == 2:
            waits = not kwargs.get("non_blocking", False)
            self._card.counts.host_reads += waits and _on_card(given[-1])
            self._card.counts.copies += 1
        elif _computes(func):
            self._card.queued(name)


def _choices(groups: SortedGroups, card: FakeCard, chosen: torch.Tensor) -> list[int]:
    """As `SortedGroups._on_host`, the one read of a layer without grouped kernels."""
    card.counts.host_reads += 1
    card.counts.choices += 1
    groups._below = 0
    return card.chosen(chosen.numel())


def _no_autocast(*given: Any, **named: Any) -> AbstractContextManager[None]:
    return nullcontext()


def _computes(func: Any) -> bool:
    """Whether an operation queues a kernel: views and empty tensors do not."""
    if func.namespace == "prim" or func.overloadpacket.__name__.startswith(
        ("empty", "new_empty", "_unsafe_view", "set_", "lift", "detach")
    ):
        return False
    writes = any(each.alias_info is not None and each.alias_info.is_write for each in func._schema.arguments)
    aliases = any(each.alias_info is not None for each in func._schema.returns)
    return writes or not aliases


def _on_card(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.device.type == DEVICE.type


def _names_card(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith(DEVICE.type)
    return isinstance(value, torch.device) and value.type == DEVICE.type


def _only_asks(func: Any) -> bool:
    return getattr(func, "__name__", "") in ("__get__", "__eq__", "device")


def _no_addresses(layers: Any) -> torch.Tensor:
    """As `buffer_table`: fake tensors lie nowhere, in buffers as long as need be."""
    return torch.tensor([[0, 0, 1 << 30, 0] for _ in layers], dtype=torch.int64)
