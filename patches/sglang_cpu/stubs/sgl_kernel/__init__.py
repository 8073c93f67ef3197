"""CPU stand-in for ``sgl_kernel``: no registry has a CPU wheel of it.

With ``SGLANG_USE_CPU_ENGINE=1`` sglang imports a few ``*_cpu`` functions at module level. Only one of
them is called on the torch-native path; wherever sglang finds no kernels under
``torch.ops.sgl_kernel`` it falls back to plain torch.
"""

__version__ = "0.4.10"


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    """Write each request's new KV-cache slots into its row of ``req_to_token`` (in place)."""
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start].to(req_to_token.dtype)
        taken += end - start


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU stand-in")

    missing.__name__ = name
    return missing
