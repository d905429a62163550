"""Stub: names that sglang imports whatever it serves; SGLANG_IS_FLASHINFER_AVAILABLE=false."""

import importlib.abc
import importlib.machinery
import sys
import types


class _Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _name(name)

    def __call__(cls, *values, **options):
        raise NotImplementedError(f"flashinfer is a stub here: {cls.__name__}")


def _name(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (), {})


__getattr__ = _name


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name == __name__ + ".norm":  # then sglang-kernel takes its own kernels
            raise ImportError("flashinfer is a stub here")
        if name.startswith(__name__ + "."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = _name
        return module

    def exec_module(self, module):
        pass


sys.meta_path.append(_Finder())
