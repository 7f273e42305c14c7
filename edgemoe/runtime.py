"""Puts store, link, slots and model together for one plan, and takes them apart again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from edgemoe.cache import ExpertCache, ExpertId, Link, SlotPool, Throttle
from edgemoe.cache.cuda_link import CudaLink, CudaStreams
from edgemoe.cache.host_store import HostStore
from edgemoe.cache.hot_temporal import HotTemporal
from edgemoe.cache.reader_link import ReaderLink
from edgemoe.cache.safetensors_store import SafetensorsStore
from edgemoe.cache.store import ExpertStore
from edgemoe.checkpoint import heat_file
from edgemoe.checkpoint.blueprint import Blueprint
from edgemoe.checkpoint.dense_loader import load_dense
from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.checkpoint.state_folder import StateFolder
from edgemoe.config import EngineConfig
from edgemoe.experts import expert_layer
from edgemoe.experts.expert_predictor import ExpertPredictor
from edgemoe.experts.lookahead import Lookahead
from edgemoe.formats.float_format import FloatFormat
from edgemoe.kernels import batch_invariant_linear, kernel_weight, rms_norm
from edgemoe.kernels.cpu.kernel_choice import few_tokens
from edgemoe.kernels.cpu.packed import packed_matrix
from edgemoe.kernels.cpu.packed.packed_matrix import PackedMatrix
from edgemoe.kernels.cpu.threads import KernelThreads
from edgemoe.kernels.packed_layers import PackedEmbedding, PackedLinear
from edgemoe.kernels.router import install_routers
from edgemoe.kernels.row_linear import BATCH_INVARIANT_TOKENS
from edgemoe.model.sequential_runner import SequentialRunner
from edgemoe.plan.plan import Plan
from edgemoe.prefetch.fill import fill_order
from edgemoe.prefetch.link_gauge import LinkGauge
from edgemoe.prefetch.prefetcher import Prefetcher
from edgemoe.results import Progress


class Runtime:
    """A loaded model whose experts live behind a cache. Everything taken is given back by `close`.

    What was hot is read from the checkpoint's state folder at the start, and written to it by `close`.
    """

    def __init__(
        self, blueprint: Blueprint, plan: Plan, config: EngineConfig, on_progress: Callable[[Progress], None]
    ) -> None:
        self._stack = ExitStack()
        self._plan = plan
        self.model: Any = None
        try:
            self._build(blueprint, plan, config, on_progress)
        except BaseException:
            self.close()
            raise

    def _build(
        self, blueprint: Blueprint, plan: Plan, config: EngineConfig, on_progress: Callable[[Progress], None]
    ) -> None:
        device = torch.device(plan.device)
        self.model = load_dense(blueprint, device, lambda done, total: on_progress(Progress("weights", done, total)))
        layouts = [moe.layout for moe in blueprint.experts_modules]
        files = SafetensorsStore(blueprint.checkpoint.files, layouts, blueprint.records, direct=plan.direct_reads)
        self._stack.callback(files.close)
        throttle = Throttle(config.link_gbps * 1e9) if config.link_gbps else None
        pool = self._stack.enter_context(SlotPool(plan.slot_classes, device))
        link = self._link(files, plan, config, throttle, on_progress)
        self._stack.callback(link.close)
        self.link = link
        policy = HotTemporal(files.experts)
        self.cache = ExpertCache(files, link, pool, policy)
        threads = self.kernel_threads = KernelThreads(plan.threads)
        self._stack.callback(threads.close)
        self.predictor = self._predictor(blueprint, files.experts, plan, config)
        self.layers = expert_layer.install(self.model, blueprint.experts_modules, self.cache, threads, self.predictor)
        self._kernel_tokens = _kernel_tokens(blueprint.experts_modules, self.model.dtype)
        if device.type == "cpu":
            batch_invariant_linear.install_gemv(self.model, threads)
            rms_norm.install_rms_norm(self.model)
            kernel_weight.install_kernel_weights(self.model, threads)
            blocks = [(moe.block(self.model), moe.experts) for moe in blueprint.experts_modules]
            install_routers(blocks, threads, lambda: self.layers.routes_itself)
            for module in self.model.modules():
                if isinstance(module, PackedLinear):
                    module.use_kernels(threads)
                elif isinstance(module, PackedEmbedding):
                    module.use_kernels()
        self.state = StateFolder.of(blueprint.checkpoint, config.state_folder)
        heat = heat_file.read(self.state, files.experts)
        policy.warm(heat)
        self._fill(files.experts, heat)
        self._stack.callback(lambda: heat_file.write(self.state, files.experts, policy.heat()))

    def _fill(self, experts: Sequence[int], heat: Mapping[ExpertId, float]) -> None:
        """Loads the hottest experts into the slots that fit them, in the order of a pass."""
        order = [
            ExpertId(*expert)
            for region, layers in self.cache.layers_of.items()
            for expert in fill_order(experts, region.count, heat, layers)
        ]
        self.cache.fill(sorted(order, key=lambda expert: expert.layer))

    def _predictor(
        self, blueprint: Blueprint, experts: Sequence[int], plan: Plan, config: EngineConfig
    ) -> ExpertPredictor:
        prefetcher = Prefetcher(self.cache, len(experts), LinkGauge(self.link, self.cache.counters))
        lookahead = Lookahead(self.model, blueprint.experts_modules)
        return ExpertPredictor(
            self.cache, prefetcher, lookahead, experts, plan.top_k, enabled=config.prefetch == "auto"
        )

    def _link(
        self,
        files: SafetensorsStore,
        plan: Plan,
        config: EngineConfig,
        throttle: Throttle | None,
        on_progress: Callable[[Progress], None],
    ) -> Link:
        if not plan.device.startswith("cuda"):
            return ReaderLink(files, config.reader_threads, throttle)
        store: ExpertStore = files
        staging = config.staging_records
        if plan.host_tier != "file":
            host = HostStore(files, plan.pinned_nbytes - staging * plan.slot_nbytes, pin=True)
            self._stack.callback(host.close)
            host.fill(config.reader_threads, lambda done, total: on_progress(Progress("experts", done, total)))
            store = host
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
        )

    def close(self) -> None:
        """Ends the threads and gives files and memory back. Idempotent."""
        # What was entered last leaves first: kernels, slots, link, files; the model's weights go with it.
        self._stack.close()
        if self.model is not None:
            _restore_forwards(self.model)
        self.model = None
        if self._plan.device.startswith("cuda"):
            # What PyTorch keeps of the device's memory is lost to other programs.
            gc.collect()
            torch.cuda.empty_cache()


def _restore_forwards(model: Any) -> None:
    """Takes what is ours away. It refers to its modules: only the garbage collector would free the weights."""
    for module in model.modules():
        own = vars(module)
        for name in [name for name in own if name == "forward" or name.startswith("edgemoe_")]:
            del own[name]


def _kernel_tokens(experts_modules: Sequence[ExpertsModule], dtype: torch.dtype) -> int:
    """Tokens up to which the CPU's kernels multiply experts, and most other matrices."""
    if all(_is_packed(moe) for moe in experts_modules):
        return PackedMatrix.max_tokens
    most = few_tokens(dtype)
    return min(most, BATCH_INVARIANT_TOKENS) if any(moe.transposed for moe in experts_modules) else most


def _is_packed(moe: ExpertsModule) -> bool:
    """Whether the CPU's kernels multiply the experts of a layer packed."""
    return all(
        not isinstance(kind, FloatFormat) and packed_matrix.fits(kind, moe.matrix_shape(name)[1])
        for name, kind in moe.formats.items()
    )
