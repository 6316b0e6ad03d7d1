"""On PYTHONPATH of a process that needs torchvision beside a CPU build of torch (Makefile).

torchvision's wheels on PyPI are made for CUDA: their compiled operators do not load here, and two of them are described
to torch all the same, which fails. Declared beforehand they are there to be described; nothing calls them.
"""

import sys
from importlib.abc import MetaPathFinder

OPERATORS = ("nms(Tensor dets, Tensor scores, float threshold)", "qnms(Tensor dets, Tensor scores, float threshold)")


class DeclaresFirst(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in OPERATORS:
                self.library.define(f"{operator} -> Tensor")


FINDER = DeclaresFirst()
sys.meta_path.insert(0, FINDER)
