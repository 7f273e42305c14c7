"""Puts store, link, slots and model together for one plan, and takes them apart again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.cache import ExpertCache, ExpertId, Link, SlotPool, Throttle, accelerator
from edgemoe.cache.cuda_link import CudaLink, CudaStreams
from edgemoe.cache.eviction.hot_temporal import HotTemporal
from edgemoe.cache.host_store import HostStore
from edgemoe.cache.reader_link import ReaderLink
from edgemoe.cache.safetensors_store import SafetensorsStore
from edgemoe.cache.slot_classes import SlotClass
from edgemoe.cache.slots import SlotTable
from edgemoe.cache.store import ExpertStore
from edgemoe.checkpoint import heat_file
from edgemoe.checkpoint.blueprint import Blueprint
from edgemoe.checkpoint.dense_loader import load_dense
from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.checkpoint.state_folder import StateFolder
from edgemoe.config import EngineConfig
from edgemoe.errors import PlanError, reading, reason
from edgemoe.experts import expert_layer
from edgemoe.experts.expert_ffn import FastExperts
from edgemoe.experts.expert_predictor import ExpertPredictor
from edgemoe.experts.host_experts import CpuHelp
from edgemoe.experts.lookahead import Lookahead
from edgemoe.formats.float_format import FloatFormat
from edgemoe.kernels import batch_invariant_linear, kernel_weight, rms_norm
from edgemoe.kernels.cpu.kernel_choice import few_tokens
from edgemoe.kernels.cpu.packed.packed_matrix import PackedMatrix
from edgemoe.kernels.cpu.threads import KernelThreads
from edgemoe.kernels.packed_layers import PackedEmbedding, PackedLinear
from edgemoe.kernels.router import install_routers
from edgemoe.kernels.row_linear import BATCH_INVARIANT_TOKENS
from edgemoe.kernels.triton import availability
from edgemoe.model.sequential_runner import SequentialRunner
from edgemoe.plan.plan import Plan
from edgemoe.planner import slots_for_all
from edgemoe.prefetch.fill import fill_order
from edgemoe.prefetch.link_gauge import LinkGauge
from edgemoe.prefetch.prefetcher import Prefetcher
from edgemoe.results import Progress
from edgemoe.sizes import format_bytes

if TYPE_CHECKING:
    from edgemoe.experts.grouped_layer import DeviceTools
    from edgemoe.model.model_runner import ModelRunner
    from edgemoe.model.pass_graph import DevicePasses


@dataclass(frozen=True)
class Transports:
    """What a runtime puts around the store and the link that it makes, such as faults to try."""

    store: Callable[[ExpertStore], ExpertStore] = lambda store: store
    link: Callable[[Link], Link] = lambda link: link


class Runtime:
    """A loaded model whose experts live behind a cache. Everything taken is given back by `close`.

    What was hot is read from the checkpoint's state folder at the start, and written to it by `close`.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        plan: Plan,
        config: EngineConfig,
        on_progress: Callable[[Progress], None],
        transports: Transports | None = None,
    ) -> None:
        self._stack = ExitStack()
        self._plan = plan
        self._transports = transports or Transports()
        self.model: Any = None
        self._host: HostStore | None = None
        """The records in RAM, where a device has them there."""
        try:
            self._build(blueprint, plan, config, on_progress)
        except torch.OutOfMemoryError as error:
            self.close()
            raise PlanError(
                f"{plan.model} was planned for {format_bytes(plan.device_free)} free on {plan.device}, "
                f"{format_bytes(plan.total_nbytes)} of them in use, and there was less ({reason(error)}): "
                f"give a smaller expert_cache= than {plan.slots} or a smaller context= than {plan.context}"
            ) from error
        except BaseException:
            self.close()
            raise

    def _build(
        self, blueprint: Blueprint, plan: Plan, config: EngineConfig, on_progress: Callable[[Progress], None]
    ) -> None:
        device = torch.device(plan.device)
        self.model = load_dense(blueprint, device, lambda done, total: on_progress(Progress("weights", done, total)))
        files = self._transports.store(_store(blueprint, plan))
        self._stack.callback(files.close)
        throttle = Throttle(config.link_gbps * 1e9) if config.link_gbps else None
        pool = self._stack.enter_context(SlotPool(plan.slot_classes, device, slots_for_all(blueprint)))
        link = self._transports.link(self._link(files, plan, config, throttle, on_progress))
        self._stack.callback(link.close)
        self.link = link
        policy = self._policy = HotTemporal(files.experts, len(blueprint.pass_modules))
        self._tools = self._device_tools(files.experts, device)
        table = None if self._tools is None else self._tools.table
        self.cache = ExpertCache(files, link, pool, policy, table)
        threads = self.kernel_threads = KernelThreads(plan.threads)
        self._stack.callback(threads.close)
        self.predictor = self._predictor(blueprint, files.experts, plan, config)
        self.layers = expert_layer.install(
            self.model,
            blueprint.experts_modules,
            self.cache,
            threads,
            self.predictor,
            grouped=self._grouped(),
            head_layers=plan.head_layers,
        )
        # Layers refer to the slots' memory.
        self._stack.callback(self.layers.layers.clear)
        self._kernel_tokens = _kernel_tokens(blueprint.experts_modules, self.model.dtype)
        self._install_kernels(blueprint, device)
        self.state = StateFolder.of(blueprint.checkpoint, config.state_folder)
        heat = heat_file.read(self.state, files.experts)
        policy.warm(heat)
        self._fill(files.experts, heat)
        self._stack.callback(lambda: heat_file.write(self.state, files.experts, policy.heat()))

    def _install_kernels(self, blueprint: Blueprint, device: torch.device) -> None:
        """Has the kernels of the CPU, or of an accelerator, multiply by what is no expert."""
        threads, tools = self.kernel_threads, self._tools
        packed = [each for each in self.model.modules() if isinstance(each, (PackedLinear, PackedEmbedding))]
        if accelerator.is_accelerator(device):
            for module in packed:
                if tools is not None and isinstance(module, PackedLinear):
                    module.use_launcher(tools.launch, BATCH_INVARIANT_TOKENS)
            return
        batch_invariant_linear.install_gemv(self.model, threads)
        rms_norm.install_rms_norm(self.model)
        kernel_weight.install_kernel_weights(self.model, threads)
        blocks = [(moe.block(self.model), moe.experts) for moe in blueprint.experts_modules]
        install_routers(blocks, threads, lambda: self.layers.routes_itself)
        for module in packed:
            if isinstance(module, PackedLinear):
                module.use_kernels(threads)
            else:
                module.use_kernels()

    def _device_tools(self, experts: Sequence[int], device: torch.device) -> DeviceTools | None:
        """What an accelerator's kernels need; None on a CPU, and where there is no Triton."""
        if not accelerator.is_accelerator(device) or availability.missing():
            return None
        # Imported late: these need Triton.
        from edgemoe.experts.grouped_layer import DeviceTools
        from edgemoe.experts.host_reads import DeviceReads
        from edgemoe.kernels.triton.grouped_ffn import patch
        from edgemoe.kernels.triton.launcher import Launcher

        launch = Launcher(device)
        tools = DeviceTools(launch, SlotTable(experts, device, partial(patch, launch)), DeviceReads(device))
        self._stack.callback(tools.close)
        return tools

    def _grouped(self) -> expert_layer.Grouped | None:
        if self._tools is None:
            return None
        from edgemoe.experts.grouped_layer import grouped

        return grouped(self.cache, self._tools, self.model.dtype, self._cpu_help())

    def _cpu_help(self) -> CpuHelp | None:
        """The CPU's part in computing missing experts, where the plan has one."""
        if self._host is None or not self._plan.cpu_share:
            return None
        made = CpuHelp(self._host, self._plan.cpu_share, self.kernel_threads, self.model.dtype)
        self._stack.callback(made.close)
        return made

    def _fill(self, experts: Sequence[int], heat: Mapping[ExpertId, float]) -> None:
        """Loads the hottest experts into the slots that fit them, in the order of a pass."""
        order = [
            ExpertId(*expert)
            for region, layers in self.cache.layers_of.items()
            for expert in fill_order(experts, region.count, heat, layers)
        ]
        self.cache.fill(sorted(order, key=lambda expert: expert.layer))

    def resize(self, classes: Sequence[SlotClass]) -> None:
        """Has the cache use as many slots of each size as `classes` say; between passes, on a CPU.

        Slots that come to use are filled by the hottest experts.
        """
        counts = {region: each.count for region, each in zip(self.cache.pool.regions, classes, strict=True)}
        self.cache.resize(counts)
        self._fill(self.cache.store.experts, self._policy.heat())

    def _predictor(
        self, blueprint: Blueprint, experts: Sequence[int], plan: Plan, config: EngineConfig
    ) -> ExpertPredictor:
        prefetcher = Prefetcher(self.cache, len(experts), LinkGauge(self.link, self.cache.counters))
        lookahead = Lookahead(self.model, blueprint.pass_modules)
        return ExpertPredictor(
            self.cache, prefetcher, lookahead, experts, plan.top_k, enabled=config.prefetch == "auto"
        )

    def _link(
        self,
        files: ExpertStore,
        plan: Plan,
        config: EngineConfig,
        throttle: Throttle | None,
        on_progress: Callable[[Progress], None],
    ) -> Link:
        if not accelerator.is_accelerator(plan.device):
            return ReaderLink(files, config.reader_threads, throttle)
        store = files
        staging = config.staging_records
        if plan.host_tier != "file":
            staged = 0 if plan.host_tier == "pinned" else staging * plan.slot_nbytes
            host = HostStore(files, plan.pinned_nbytes - staged, pin=True)
            self._stack.callback(host.close)
            host.fill(config.reader_threads, lambda done, total: on_progress(Progress("experts", done, total)))
            self._host = store = host
            # Page-locked records are copied from where they lie.
            staging = 0 if host.pinned_nbytes == host.nbytes else staging
        return CudaLink(store, CudaStreams(torch.device(plan.device)), staging, config.reader_threads, throttle)

    def runner(self) -> SequentialRunner:
        """What runs passes on the loaded model."""
        plan = self._plan
        share = plan.layers * plan.top_k / plan.experts
        device = torch.device(plan.device)
        return SequentialRunner(
            self.model,
            self.layers,
            device,
            plan.prefill_chunk,
            plan.threads,
            plan.nbytes_per_token,
            share,
            self._kernel_tokens,
            self.kernel_threads,
            self._device_passes(),
        )

    def _device_passes(self) -> DevicePasses | None:
        if self._tools is None:
            return None
        from edgemoe.model.pass_graph import DRAFT_ROOM, DeviceCapturer, DevicePasses

        capturer = DeviceCapturer(torch.device(self._plan.device))
        return DevicePasses(self._tools, capturer, self._plan.context + DRAFT_ROOM)

    def device_passes(self, runner: ModelRunner) -> str:
        """How `runner` passes few tokens through an accelerator: "graphs", or why not; empty on a CPU."""
        if not accelerator.is_accelerator(self._plan.device):
            return ""
        return (availability.missing() if self._tools is None else runner.graph_refusal) or "graphs"

    def close(self) -> None:
        """Ends the threads and gives files and memory back. Idempotent."""
        # What was entered last leaves first: kernels, slots, link, files; the model's weights go with it.
        self._stack.close()
        if self.model is not None:
            _restore_forwards(self.model)
        self.model = None
        if accelerator.is_accelerator(self._plan.device):
            # What PyTorch keeps is lost to other programs, and to the next plan of this one.
            gc.collect()
            accelerator.synchronize(self._plan.device)
            accelerator.release_unused()


def _store(blueprint: Blueprint, plan: Plan) -> SafetensorsStore:
    """The records in the checkpoint's files."""
    checkpoint, layouts = blueprint.checkpoint, [moe.layout for moe in blueprint.experts_modules]
    # The dense weights were read just now, by other handles.
    with reading(checkpoint.name):
        return SafetensorsStore(
            checkpoint.files,
            layouts,
            blueprint.records,
            direct=plan.direct_reads,
            identities=checkpoint.identities,
        )


def _restore_forwards(model: Any) -> None:
    """Takes what is ours away. It refers to its modules: only the garbage collector would free the weights."""
    for module in model.modules():
        own = vars(module)
        for name in [name for name in own if name == "forward" or name.startswith("edgemoe_")]:
            del own[name]


def _kernel_tokens(experts_modules: Sequence[ExpertsModule], dtype: torch.dtype) -> int:
    """Tokens up to which the CPU's kernels multiply experts, and most other matrices."""
    with_kernels = all(map(FastExperts.fits, experts_modules))
    if with_kernels and all(map(_is_packed, experts_modules)):
        return PackedMatrix.max_tokens
    most = few_tokens(dtype)
    limited = not with_kernels or any(moe.transposed for moe in experts_modules)
    return min(most, BATCH_INVARIANT_TOKENS) if limited else most


def _is_packed(moe: ExpertsModule) -> bool:
    """Whether the experts of a layer are packed."""
    return not any(isinstance(kind, FloatFormat) for kind in moe.formats.values())
