"""The training methods, a folder each: IMM, the many-step teacher, moment matching distillation.

A method is a `Method` record; `METHODS` names all of them, and a command is made of each. A new one is a file of its own and a
line here.
"""

from __future__ import annotations

from .distill import DISTILLATION
from .imm import IMM
from .method import Method
from .teacher import TEACHER

METHODS: dict[str, Method] = {method.name: method for method in (IMM, TEACHER, DISTILLATION)}
