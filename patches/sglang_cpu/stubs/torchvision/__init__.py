"""Import-time stand-in for ``torchvision``.

The wheel on PyPI is a CUDA build whose extension does not load beside a CPU-only torch. sglang and
transformers import it at module level for vision models; serving text never calls it.
"""

import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "0.28.0"


class _Member(type):
    """A class whose attributes are their own names, for enums such as ``InterpolationMode.BICUBIC``."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name[:1].isupper():
            value = _Member(name, (), {"__module__": self.__name__})
        else:

            def value(*args, **kwargs):
                raise RuntimeError(f"{self.__name__}.{name}: torchvision is not installed on this CPU server")

        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.startswith("torchvision."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Finder())
