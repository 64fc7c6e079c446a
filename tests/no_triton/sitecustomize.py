"""On PYTHONPATH, this makes the interpreter behave as one on which Triton is not installed."""

import sys


class _NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton' (blocked by a test)", name=name)
        return None


sys.meta_path.insert(0, _NoTriton())
