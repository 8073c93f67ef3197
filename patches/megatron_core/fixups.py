"""The changes to single modules of megatron-core 0.16.1."""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from megatron_mapo.patches.megatron_core import cpu_torch, data_only
from megatron_mapo.patches.megatron_core.adam import FusedAdam
from megatron_mapo.patches.megatron_core.import_hook import Fixup

_real_type = torch.Tensor.type


def _cuda_type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None and self.device.type == "cpu":
        return _real_type(self).replace("torch.", "torch.cuda.", 1)
    return _real_type(self, dtype, *args, **kwargs)


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """``Tensor.type()`` says ``torch.cuda.FloatTensor``: the optimizer compares with such literals."""
    before = torch.Tensor.type
    torch.Tensor.type = _cuda_type_name  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = before  # type: ignore[method-assign]


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return wrapped


def _random(module: ModuleType) -> None:
    """The CUDA RNG tracker works on the CPU generator; its warning about that is the purpose here."""
    module._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(module.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())


def _distributed_optimizer_types(module: ModuleType) -> None:
    cls = module.DistributedOptimizer
    cls.__init__ = _with_cuda_type_names(cls.__init__)
    build = cls.__dict__["_build_model_and_main_param_groups"].__func__
    cls._build_model_and_main_param_groups = classmethod(_with_cuda_type_names(build))


def _float16_optimizer_types(module: ModuleType) -> None:
    cls = module.Float16OptimizerWithFloat16Params
    cls.__init__ = _with_cuda_type_names(cls.__init__)
    module.clip_grad_by_total_norm_fp32 = _with_cuda_type_names(module.clip_grad_by_total_norm_fp32)


def _no_jit(module: ModuleType) -> None:
    """torch.compile of megatron's tiny pointwise functions costs 20 s on a CPU and gains nothing."""
    module.disable_jit_fuser()


def _distributed_optimizer_adam(module: ModuleType) -> None:
    if not module.HAVE_APEX_OR_TE:
        module.HAVE_APEX_OR_TE = module.USING_APEX_OPTIMIZER = True
        module.Adam = FusedAdam


def _optimizer_adam(module: ModuleType) -> None:
    if module.USING_PYTORCH_OPTIMIZER:
        module.Adam = FusedAdam
        module.USING_PYTORCH_OPTIMIZER = False


def _write_queue_without_a_process(module: ModuleType) -> None:
    """What was written is told through a queue; megatron starts a process for it, and threads need none."""
    module._get_write_results_queue = queue.Queue


def _gathered_state_keeps_its_padding(module: ModuleType) -> None:
    """Saving cuts parameters out of the gathered optimizer state by their place in the buffer, where every bucket ends
    with padding; the gathered state has none. Behind the first padded bucket the wrong numbers were saved.
    """
    cls = module.DistributedOptimizer
    gather, sharded = cls.get_parameter_state_dp_zero, cls.sharded_param_state_fully_reshardable

    def gather_with_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = gather(self, *args, **kwargs)
        for index, buffer in enumerate(self.buffers if state is not None else ()):
            for tensors in state[index].values():
                for key in ("param", "exp_avg", "exp_avg_sq"):
                    tensors[key] = _with_bucket_padding(tensors[key], buffer)
        return state

    @functools.wraps(sharded)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.get_parameter_state_dp_zero = functools.partial(gather_with_padding, self)
        try:
            return sharded(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    cls.sharded_param_state_fully_reshardable = wrapped


def _with_bucket_padding(flat: torch.Tensor, buffer: Any) -> torch.Tensor:
    """``flat`` (all buckets without the padding at their ends) with every bucket at its offset in the buffer."""
    if len(buffer.buckets) == 1:
        return flat
    padded = torch.zeros(buffer.numel, dtype=flat.dtype)
    start = 0
    for bucket in buffer.buckets:
        padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = flat[start : start + bucket.numel_unpadded]
        start += bucket.numel_unpadded
    return padded


def _index_without_code(module: ModuleType) -> None:
    """A checkpoint's index and the objects among its tensors are pickles, which megatron and torch read as code."""
    module.FileSystemReader = module.CachedMetadataFileSystemReader = data_only.DataOnlyReader  # type: ignore[attr-defined]
    module.MCoreLoadPlanner.load_bytes = data_only.load_object


def _common_without_code(module: ModuleType) -> None:
    """``torch.load`` takes data only, unless TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set. Here that does not count."""
    module.torch = cpu_torch.Proxy(  # type: ignore[attr-defined]
        module.torch, load=functools.partial(torch.load, weights_only=True)
    )


def _no_transformer_engine_router(module: ModuleType) -> None:
    """The router asks for a name that is defined only where Transformer Engine is installed."""
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None  # type: ignore[attr-defined]


def _split_sizes_of_cpu_tensors(module: ModuleType) -> None:
    """The token dispatcher turns split sizes into numbers only if they are on a GPU."""
    move = module.maybe_move_tensor_to_cpu

    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return move(tensor, as_numpy, record_stream)

    module.maybe_move_tensor_to_cpu = moved  # type: ignore[attr-defined]


def _uneven_parts(module: ModuleType) -> None:
    """gloo gathers and scatters equal parts only; experts cut over a tensor group exchange uneven ones."""
    gather, scatter = module._gather_along_first_dim, module._reduce_scatter_along_first_dim

    def gather_uneven(local: torch.Tensor, group: Any, sizes: Any = None, *args: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return gather(local, group, sizes, *args)
        rows = max(int(n) for n in sizes)
        padded = local.new_zeros(rows, *local.shape[1:])
        padded[: len(local)] = local
        whole = local.new_empty(len(sizes), *padded.shape)
        torch.distributed.all_gather_into_tensor(whole.flatten(0, 1), padded, group=group)
        return torch.cat([part[: int(n)] for part, n in zip(whole, sizes, strict=True)])

    def scatter_uneven(whole: torch.Tensor, group: Any, sizes: Any = None, *args: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return scatter(whole, group, sizes, *args)
        total = whole.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split([int(n) for n in sizes])[group.rank()].contiguous()

    module._gather_along_first_dim = gather_uneven  # type: ignore[attr-defined]
    module._reduce_scatter_along_first_dim = scatter_uneven  # type: ignore[attr-defined]


EVERYWHERE: dict[str, list[Fixup]] = {
    "megatron.core.optimizer": [_optimizer_adam],
    "megatron.core.optimizer.distrib_optimizer": [_distributed_optimizer_adam, _gathered_state_keeps_its_padding],
    "megatron.core.dist_checkpointing.strategies.filesystem_async": [_write_queue_without_a_process],
    "megatron.core.dist_checkpointing.strategies.torch": [_index_without_code],
    "megatron.core.dist_checkpointing.strategies.common": [_common_without_code],
    "megatron.core.transformer.moe.moe_utils": [_no_transformer_engine_router],
}
CPU_ONLY: dict[str, list[Fixup]] = {
    "megatron.core.tensor_parallel.random": [_random],
    "megatron.core.optimizer.distrib_optimizer": [_distributed_optimizer_types],
    "megatron.core.optimizer.optimizer": [_float16_optimizer_types],
    "megatron.core.jit": [_no_jit],
    "megatron.core.transformer.moe.moe_utils": [_split_sizes_of_cpu_tensors],
    "megatron.core.tensor_parallel.mappings": [_uneven_parts],
}


def for_device(cpu: bool) -> Fixup:
    """The function that mends one freshly imported module, for a machine with or without CUDA."""
    proxy = cpu_torch.build() if cpu else None

    def fix(module: ModuleType) -> None:
        if proxy is not None and getattr(module, "torch", None) is torch:
            module.torch = proxy  # type: ignore[attr-defined]
        for change in EVERYWHERE.get(module.__name__, []):
            change(module)
        for change in CPU_ONLY.get(module.__name__, []) if cpu else []:
            change(module)

    return fix
