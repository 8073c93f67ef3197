"""Import-time stand-in for ``triton``: 1 GB installed, and nothing on the CPU path launches a kernel.

Uses the pass-through module that sglang ships for machines without triton
(``sglang/_platform_stubs.py``), loaded by file so that sglang itself is not imported here.
"""

import importlib.machinery
import importlib.util
import os
import sys


def _load_platform_stubs():
    for folder in sys.path:
        path = os.path.join(folder or ".", "sglang", "_platform_stubs.py")
        if os.path.exists(path):
            spec = importlib.util.spec_from_file_location("_sglang_platform_stubs", path)
            module = importlib.util.module_from_spec(spec)
            sys.modules["_sglang_platform_stubs"] = module
            spec.loader.exec_module(module)
            return module
    raise ImportError("the triton stand-in needs sglang")


_stubs = _load_platform_stubs()


class _Finder:
    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname.startswith("triton."):
            return importlib.machinery.ModuleSpec(fullname, _Finder, is_package=True)
        return None

    @staticmethod
    def create_module(spec):
        return _stubs._MockModule(spec.name)

    @staticmethod
    def exec_module(module):
        pass


_triton = _stubs._MockModule("triton")
_triton.__version__ = "3.0.0"
_triton.cdiv = _stubs._cdiv
_triton.next_power_of_2 = _stubs._next_power_of_2
_triton.Config = _stubs._Config
sys.meta_path.insert(0, _Finder)
sys.modules["triton"] = _triton
