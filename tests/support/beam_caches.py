"""Caches of what Beam works out anew for every pipeline: half of what a job costs in a test's own process.

Each answer depends on its arguments alone, so a job does what it does without them. What users start runs without: in
tests the cold commands and the workers that are processes. tests/packaging/test_private_apis.py says what of Beam this
relies on.
"""

import argparse
import copy
import dis
import functools
import types

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms import core


def install():
    """Puts the caches in place, for the whole process."""
    dis.get_instructions = _once_for_each_code(dis.get_instructions)
    core.get_function_args_defaults = _once_for_each_method(core.get_function_args_defaults)
    PipelineOptions.__init__ = _once_for_each_command_line(PipelineOptions.__init__)


def _once_for_each_code(instructions):
    """Beam infers the types that functions return from their bytecode, of each lambda whenever it is made."""
    listed = functools.cache(lambda code, **options: tuple(instructions(code, **options)))

    @functools.wraps(instructions)
    def cached(function, **options):
        return iter(listed(getattr(function, "__code__", function), **options))

    return cached


def _once_for_each_method(arguments):
    """Beam looks for state in the signature of every method of every DoFn, eight times."""
    of_method = functools.cache(lambda function, owner: arguments(types.MethodType(function, owner)))

    @functools.wraps(arguments)
    def cached(function):
        if not isinstance(function, types.MethodType):
            return arguments(function)
        # Which object a method is bound to makes no difference to its arguments; its class stands in for it.
        names, defaults = of_method(function.__func__, type(function.__self__))
        return [*names], [*defaults]

    return cached


def _once_for_each_command_line(init):
    """Beam makes a parser and parses its flags whenever it looks at options, 850 times in one job."""

    @functools.cache
    def parsed(options, flags):
        made = options.__new__(options)
        init(made, flags)
        return vars(made)

    @functools.wraps(init)
    def cached(self, flags=None, **overrides):
        if overrides or flags is None or isinstance(flags, str):
            init(self, flags, **overrides)
            return
        kept = parsed(type(self), tuple(flags))
        # Values are shared but for lists, which Beam appends to.
        values = {name: copy.copy(value) for name, value in kept["_all_options"].items()}
        vars(self).update(_flags=flags, _visible_options=argparse.Namespace(**values), _all_options=values)

    return cached
